//! The NumPy `.npy` format, versions 1 to 3: header and elements.
//!
//! The header is a Python literal of three known keys; it is read here rather than by a crate because those parse any
//! literal, recursively, and multiply dimensions unchecked, before one can say no. Sizes are checked against what the
//! file can hold before anything is allocated. Big-endian and Fortran-ordered data are rearranged.
//! Not here: structured, object and text arrays (refused), `.npz` (`npz`).

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::array::byte_len;
use super::{Array, DType, DatasetError};

/// Longest header accepted; NumPy's own limit is 10,000 characters.
const HEADER_BYTES_MAX: usize = 16 << 10;
const MAGIC: &[u8] = b"\x93NUMPY";

/// Reads a `.npy` file; the array is named `x`, since a single array has no other name.
pub(super) fn read(path: &Path, samples: Option<usize>) -> Result<Array, DatasetError> {
    let io = |source| DatasetError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    read_from(BufReader::new(file), size, "x", path, samples)
}

/// Reads one array from `reader`, which holds at most `size_max` bytes, header included.
///
/// Stops after `samples` samples where the order on disk allows it.
pub(super) fn read_from(
    mut reader: impl Read,
    size_max: u64,
    name: &str,
    path: &Path,
    samples: Option<usize>,
) -> Result<Array, DatasetError> {
    let corrupt = |problem: String| DatasetError::Corrupt { path: path.into(), problem };
    let (text, header_len) = read_header(&mut reader).map_err(corrupt)?;
    let header = Header::parse(&text).map_err(corrupt)?;
    let claimed = header.file_bytes().ok_or_else(|| corrupt(header.too_large(size_max)))?;
    if claimed > size_max.saturating_sub(header_len) {
        return Err(corrupt(header.too_large(size_max.saturating_sub(header_len))));
    }
    let mut shape = header.shape.clone();
    if let (Some(limit), Some(first), false) = (samples, shape.first_mut(), header.fortran) {
        *first = limit.min(*first);
    }
    let raw = read_elements(reader, &shape, header.kind, name, path)?;
    let ordered = if header.fortran { to_row_major(&raw, &shape, header.kind.width) } else { raw };
    let (dtype, bytes) = header.kind.decode(ordered).map_err(corrupt)?;
    Array::new(name, shape, dtype, bytes).map_err(|error| match error {
        DatasetError::Corrupt { problem, .. } => corrupt(problem),
        other => other,
    })
}

fn read_header(reader: &mut impl Read) -> Result<(String, u64), String> {
    let short = |_| "is cut off in its header".to_string();
    let mut start = [0u8; 8];
    reader.read_exact(&mut start).map_err(|_| "is not a .npy array: too short".to_string())?;
    if &start[..6] != MAGIC {
        return Err("is not a .npy array: the first bytes are not \\x93NUMPY".into());
    }
    let (len, fixed) = match start[6] {
        1 => {
            let mut len = [0u8; 2];
            reader.read_exact(&mut len).map_err(short)?;
            (usize::from(u16::from_le_bytes(len)), 10)
        }
        2 | 3 => {
            let mut len = [0u8; 4];
            reader.read_exact(&mut len).map_err(short)?;
            (u32::from_le_bytes(len) as usize, 12)
        }
        version => return Err(format!("has .npy version {version}, expected 1, 2 or 3")),
    };
    if len > HEADER_BYTES_MAX {
        return Err(format!("has a header of {len} bytes, expected at most {HEADER_BYTES_MAX}"));
    }
    let mut text = vec![0u8; len];
    reader.read_exact(&mut text).map_err(short)?;
    let text = String::from_utf8(text).map_err(|_| "has a header that is not text".to_string())?;
    Ok((text, fixed + len as u64))
}

/// Element type on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    /// `f`, `i`, `u` or `b`.
    code: char,
    /// Bytes.
    width: usize,
    big_endian: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Header {
    kind: Kind,
    fortran: bool,
    shape: Vec<usize>,
}

impl Header {
    fn parse(text: &str) -> Result<Self, String> {
        let descr = text_value(text, "descr")?;
        let fortran = match entry(text, "fortran_order")? {
            rest if rest.starts_with("True") => true,
            rest if rest.starts_with("False") => false,
            _ => return Err("header: `fortran_order` is neither True nor False".into()),
        };
        Ok(Self { kind: Kind::parse(descr)?, fortran, shape: shape(entry(text, "shape")?)? })
    }

    fn file_bytes(&self) -> Option<u64> {
        let elements = self.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?;
        u64::try_from(elements.checked_mul(self.kind.width)?).ok()
    }

    fn too_large(&self, available: u64) -> String {
        let claim =
            self.file_bytes().map_or("more bytes than can be counted".into(), |n| format!("{n} bytes"));
        format!("header claims shape {:?}, {claim}; the file holds {available}", self.shape)
    }
}

/// What follows `'key':`.
fn entry<'a>(text: &'a str, key: &str) -> Result<&'a str, String> {
    let missing = || format!("header has no `{key}`");
    let at = [format!("'{key}'"), format!("\"{key}\"")].iter().find_map(|k| Some(text.find(k)? + k.len()));
    let rest = text[at.ok_or_else(missing)?..].trim_start();
    Ok(rest.strip_prefix(':').ok_or_else(missing)?.trim_start())
}

fn text_value<'a>(text: &'a str, key: &str) -> Result<&'a str, String> {
    let rest = entry(text, key)?;
    let quote = rest.chars().next().filter(|c| matches!(c, '\'' | '"'));
    let Some(quote) = quote else { return Err("is a structured array, expected plain numbers".into()) };
    rest[1..].split(quote).next().ok_or_else(|| format!("header: `{key}` does not end"))
}

fn shape(rest: &str) -> Result<Vec<usize>, String> {
    let inner = rest.strip_prefix('(').and_then(|rest| rest.split_once(')')).map(|(inner, _)| inner);
    let inner = inner.ok_or_else(|| "header: `shape` is not a tuple".to_string())?;
    let dims = inner.split(',').map(str::trim).filter(|dim| !dim.is_empty());
    // Python 2 wrote long integers as `3L`.
    dims.map(|dim| {
        let number = dim.trim_end_matches('L').parse::<usize>();
        number.map_err(|_| format!("header: dimension `{dim}` is not a count"))
    })
    .collect()
}

impl Kind {
    fn parse(descr: &str) -> Result<Self, String> {
        let refuse =
            || format!("has dtype `{descr}`, expected float16/32/64, int8/16/32/64, uint8/16/32 or bool");
        let mut chars = descr.chars();
        let order = chars.next().ok_or_else(refuse)?;
        let code = chars.next().ok_or_else(refuse)?;
        let width: usize = chars.as_str().parse().map_err(|_| refuse())?;
        let known =
            matches!((code, width), ('f', 2 | 4 | 8) | ('i', 1 | 2 | 4 | 8) | ('u', 1 | 2 | 4) | ('b', 1));
        if !known || !matches!(order, '<' | '>' | '|' | '=') {
            return Err(refuse());
        }
        Ok(Self { code, width, big_endian: order == '>' })
    }

    /// Little-endian elements of a delivered dtype; narrow kinds are widened exactly.
    fn decode(self, mut bytes: Vec<u8>) -> Result<(DType, Vec<u8>), String> {
        if self.big_endian {
            bytes.chunks_exact_mut(self.width).for_each(<[u8]>::reverse);
        }
        Ok(match (self.code, self.width) {
            ('f', 2) => (DType::F32, map(&bytes, |b| f16_to_f32(u16::from_le_bytes(b)).to_le_bytes())),
            ('f', 4) => (DType::F32, bytes),
            ('f', _) => (DType::F64, bytes),
            ('i', 1) => (DType::I8, bytes),
            ('i', 2) => (DType::I32, map(&bytes, |b| i32::from(i16::from_le_bytes(b)).to_le_bytes())),
            ('i', 4) => (DType::I32, bytes),
            ('i', _) => (DType::I64, bytes),
            ('u', 1) => (DType::U8, bytes),
            ('u', 2) => (DType::I32, map(&bytes, |b| i32::from(u16::from_le_bytes(b)).to_le_bytes())),
            ('u', _) => (DType::I64, map(&bytes, |b| i64::from(u32::from_le_bytes(b)).to_le_bytes())),
            _ => match bytes.iter().find(|byte| **byte > 1) {
                Some(byte) => return Err(format!("a Boolean is {byte}, expected 0 or 1")),
                None => (DType::Bool, bytes),
            },
        })
    }
}

fn map<const N: usize, const M: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> [u8; M]) -> Vec<u8> {
    bytes.as_chunks::<N>().0.iter().flat_map(|chunk| f(*chunk)).collect()
}

/// IEEE binary16 to binary32, exact.
fn f16_to_f32(half: u16) -> f32 {
    let sign = if half >> 15 == 1 { -1.0f32 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(half >> 10 & 0x1f), f32::from(half & 0x3ff));
    sign * match exponent {
        0 => mantissa * 2f32.powi(-24),
        31 if mantissa == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        _ => (1024.0 + mantissa) * 2f32.powi(exponent - 25),
    }
}

fn read_elements(
    reader: impl Read,
    shape: &[usize],
    kind: Kind,
    name: &str,
    path: &Path,
) -> Result<Vec<u8>, DatasetError> {
    let corrupt = |problem: String| DatasetError::Corrupt { path: path.into(), problem };
    let elements = byte_len(shape, DType::U8).and_then(|n| n.checked_mul(kind.width));
    let expected = elements.ok_or_else(|| corrupt(format!("shape {shape:?} overflows")))?;
    let mut bytes = Vec::new();
    let full = |_| DatasetError::OutOfMemory { array: name.into(), bytes: expected };
    bytes.try_reserve_exact(expected).map_err(full)?;
    let read = reader.take(expected as u64).read_to_end(&mut bytes);
    read.map_err(|e| corrupt(format!("elements cannot be read: {e}")))?;
    if bytes.len() != expected {
        return Err(corrupt(format!(
            "is cut off: shape {shape:?} needs {expected} bytes, has {}",
            bytes.len()
        )));
    }
    Ok(bytes)
}

/// Column-major elements in row-major order.
fn to_row_major(bytes: &[u8], shape: &[usize], width: usize) -> Vec<u8> {
    let mut strides = vec![0usize; shape.len()];
    let mut stride = width;
    for (slot, dim) in strides.iter_mut().zip(shape) {
        *slot = stride;
        stride *= dim;
    }
    let mut index = vec![0usize; shape.len()];
    let mut out = Vec::with_capacity(bytes.len());
    while out.len() < bytes.len() {
        let at: usize = index.iter().zip(&strides).map(|(i, s)| i * s).sum();
        out.extend_from_slice(&bytes[at..at + width]);
        for (i, dim) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < *dim {
                break;
            }
            *i = 0;
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A version 1 `.npy` file.
    pub(in super::super) fn npy(descr: &str, fortran: bool, shape: &str, data: &[u8]) -> Vec<u8> {
        let order = if fortran { "True" } else { "False" };
        let text = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n");
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.extend((text.len() as u16).to_le_bytes());
        file.extend(text.as_bytes());
        file.extend(data);
        file
    }

    fn open(file: &[u8], samples: Option<usize>) -> Result<Array, DatasetError> {
        read_from(file, file.len() as u64, "x", Path::new("a.npy"), samples)
    }

    fn error(file: &[u8]) -> String {
        open(file, None).unwrap_err().to_string()
    }

    #[test]
    fn element_kinds_become_their_dtype() {
        for (descr, data, dtype, expect) in [
            ("<f4", 1.5f32.to_le_bytes().to_vec(), DType::F32, 1.5f32.to_le_bytes().to_vec()),
            (">f4", 1.5f32.to_be_bytes().to_vec(), DType::F32, 1.5f32.to_le_bytes().to_vec()),
            ("<f8", 1.5f64.to_le_bytes().to_vec(), DType::F64, 1.5f64.to_le_bytes().to_vec()),
            ("<f2", 0x3e00u16.to_le_bytes().to_vec(), DType::F32, 1.5f32.to_le_bytes().to_vec()),
            ("<i8", (-2i64).to_le_bytes().to_vec(), DType::I64, (-2i64).to_le_bytes().to_vec()),
            ("<i2", (-2i16).to_le_bytes().to_vec(), DType::I32, (-2i32).to_le_bytes().to_vec()),
            ("<u4", u32::MAX.to_le_bytes().to_vec(), DType::I64, i64::from(u32::MAX).to_le_bytes().to_vec()),
            ("|u1", vec![200], DType::U8, vec![200]),
            ("|b1", vec![1], DType::Bool, vec![1]),
        ] {
            let array = open(&npy(descr, false, "(1,)", &data), None).unwrap();
            assert_eq!((array.dtype, array.slice(0..1).unwrap().bytes), (dtype, expect), "{descr}");
        }
    }

    #[test]
    fn every_half_float_is_converted_exactly() {
        // Oracle: the value by its definition in f64.
        for bits in 0..=u16::MAX {
            let (e, m) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
            let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
            let expect = match e {
                0 => m / 1024.0 * 2f64.powi(-14),
                31 if m > 0.0 => f64::NAN,
                31 => f64::INFINITY,
                _ => (1.0 + m / 1024.0) * 2f64.powi(e - 15),
            } * sign;
            let actual = f64::from(f16_to_f32(bits));
            assert!(actual == expect || (actual.is_nan() && expect.is_nan()), "{bits:#x}: {actual} {expect}");
        }
    }

    #[test]
    fn fortran_order_is_rearranged() {
        // [[0, 1, 2], [3, 4, 5]] stored by columns.
        let array = open(&npy("|u1", true, "(2, 3)", &[0, 3, 1, 4, 2, 5]), Some(1)).unwrap();
        assert_eq!(array.slice(0..2).unwrap().bytes, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn only_the_samples_asked_for_are_read() {
        let array = open(&npy("|u1", false, "(3, 2)", &[0, 1, 2, 3, 4, 5]), Some(2)).unwrap();
        assert_eq!(array.shape, [2, 2]);
    }

    #[test]
    fn absurd_sizes_are_refused_before_allocation() {
        let quintillion = error(&npy("<f4", false, "(1152921504606846976,)", &[0; 16]));
        assert_eq!(
            quintillion,
            "data `a.npy`: header claims shape [1152921504606846976], 4611686018427387904 bytes; the file holds 16"
        );
        let overflow = error(&npy("<f4", false, "(4294967296, 4294967296, 4)", &[]));
        assert!(overflow.contains("more bytes than can be counted"), "{overflow}");
        assert!(error(&npy("<f4", false, "(99999999999999999999999,)", &[])).contains("is not a count"));
    }

    #[test]
    fn damaged_headers_are_refused() {
        let good = npy("<f4", false, "(2,)", &[0; 8]);
        for cut in 0..good.len() {
            assert!(open(&good[..cut], None).is_err(), "cut at {cut}");
        }
        assert!(error(b"PK\x03\x04 nothing").contains("is not a .npy array"));
        assert!(error(&npy("|O", false, "(2,)", &[0; 8])).contains("has dtype `|O`"));
        assert!(error(&npy("<c8", false, "(2,)", &[0; 16])).contains("has dtype `<c8`"));
        assert!(error(&npy("<f4", false, "(-2,)", &[0; 8])).contains("dimension `-2` is not a count"));
        assert!(error(&npy("<f4", false, "()", &[0; 4])).contains("first dimension that counts samples"));
        assert!(error(&npy("|b1", false, "(1,)", &[2])).contains("a Boolean is 2"));
        let mut long = good;
        long[8..10].copy_from_slice(&u16::MAX.to_le_bytes());
        assert!(error(&long).contains("a header of 65535 bytes"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), magic: bool) {
            if magic && bytes.len() >= 12 {
                bytes[..12].copy_from_slice(b"\x93NUMPY\x01\x00\x80\x00{'");
            }
            let _ = open(&bytes, None);
        }

        #[test]
        fn a_damaged_file_gives_an_error_or_as_many_bytes_as_its_shape(at in 0usize..80, value: u8) {
            let mut file = npy("<f4", false, "(2, 3)", &[0; 24]);
            let at = at % file.len();
            file[at] = value;
            if let Ok(array) = open(&file, None) {
                let per = array.dtype.size();
                prop_assert_eq!(array.bytes_held(), array.shape.iter().product::<usize>() * per);
            }
        }
    }
}
