//! The header of one safetensors file: names, types, shapes and places of its tensors.
//!
//! Layout: u64 little-endian header length `n`, `n` bytes of JSON, then the data that the JSON's offsets count from.
//! Written out rather than taken from the `safetensors` crate, which lets a name stand twice and tells neither offsets
//! nor lengths when they are wrong; the crate is the oracle of the tests. Not here: which files there are (`folder`).

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::{Dtype, ModelError};

/// Bytes that a header may have; the limit of the format's own library.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Bytes in front of the JSON: its length.
pub(super) const LENGTH_BYTES: usize = 8;

/// Entry of the header that is no tensor.
const METADATA: &str = "__metadata__";

/// Element types that checkpoints store, by their names in a header. Eight-bit floats are carried, never computed with.
const TYPES: [(&str, Dtype); 15] = [
    ("F32", Dtype::F32),
    ("F16", Dtype::F16),
    ("BF16", Dtype::Bf16),
    ("F64", Dtype::F64),
    ("I64", Dtype::I64),
    ("I32", Dtype::I32),
    ("I16", Dtype::I16),
    ("I8", Dtype::I8),
    ("U64", Dtype::U64),
    ("U32", Dtype::U32),
    ("U16", Dtype::U16),
    ("U8", Dtype::U8),
    ("BOOL", Dtype::Bool),
    ("F8_E4M3", Dtype::Other(17)),
    ("F8_E5M2", Dtype::Other(19)),
];

/// The element type of that name in a header.
pub fn stored_type(name: &str) -> Option<Dtype> {
    TYPES.iter().find(|entry| entry.0 == name).map(|entry| entry.1)
}

/// How a header calls that type; none if the format has no word for it.
pub fn stored_type_name(dtype: Dtype) -> Option<&'static str> {
    TYPES.iter().find(|entry| entry.1 == dtype).map(|entry| entry.0)
}

/// One tensor of a file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Bytes of the file, not of its data part.
    pub(super) range: Range<usize>,
}

fn header(problem: String) -> ModelError {
    ModelError::Malformed { subject: "header".to_owned(), problem }
}

/// Where the JSON lies in a file of `file` bytes that begins with `first`.
///
/// # Errors
/// `Malformed` naming the header: lengths that the file does not have.
pub(super) fn place(first: &[u8], file: usize) -> Result<Range<usize>, ModelError> {
    let length = first
        .first_chunk::<LENGTH_BYTES>()
        .ok_or_else(|| header(format!("expected at least {LENGTH_BYTES} bytes, the file has {file}")))?;
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        return Err(header(format!("claims {length} bytes, expected at most {HEADER_BYTES_MAX}")));
    }
    // At most 10^8, which every usize holds.
    let end = LENGTH_BYTES + length as usize;
    if end > file {
        let rest = file.saturating_sub(LENGTH_BYTES);
        return Err(header(format!("claims {length} bytes, the file has {rest} behind its length")));
    }
    Ok(LENGTH_BYTES..end)
}

/// Reads and checks the JSON, behind which data begins at `start` of `file` bytes.
///
/// # Errors
/// `Malformed` naming the header or the tensor: JSON that is none, a name that stands twice, a type that is not known,
/// data that overlaps, leaves gaps or does not have the bytes of its shape.
pub(super) fn entries(json: &[u8], start: usize, file: usize) -> Result<Vec<Entry>, ModelError> {
    let raw: Listing =
        serde_json::from_slice(json).map_err(|e| header(format!("is not the JSON expected: {e}")))?;
    places(raw.0, start, file)
}

/// What the JSON says of one tensor.
#[derive(Deserialize)]
struct Raw {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// All of them as they stand, names possibly twice.
struct Listing(Vec<(String, Raw)>);

impl<'de> Deserialize<'de> for Listing {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ListingVisitor)
    }
}

struct ListingVisitor;

impl<'de> Visitor<'de> for ListingVisitor {
    type Value = Listing;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Listing, A::Error> {
        let (mut entries, mut described) = (Vec::new(), false);
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<Option<BTreeMap<String, String>>>()?;
                if std::mem::replace(&mut described, true) {
                    return Err(A::Error::duplicate_field(METADATA));
                }
                continue;
            }
            let raw = map.next_value().map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
            entries.push((name, raw));
        }
        Ok(Listing(entries))
    }
}

/// Turns offsets into ranges of the file, which must follow one another from `start` to `end`.
fn places(mut raw: Vec<(String, Raw)>, start: usize, end: usize) -> Result<Vec<Entry>, ModelError> {
    refuse_twins(&mut raw)?;
    raw.sort_by_key(|(_, raw)| raw.data_offsets);
    let mut next = 0_u64;
    let mut entries = Vec::with_capacity(raw.len());
    let data = (end - start) as u64;
    for (name, raw) in raw {
        let wrong = |problem| malformed(&name, problem);
        let [from, to] = raw.data_offsets;
        if from != next || to < from || to > data {
            return Err(wrong(format!(
                "data offsets are {from} to {to}, expected a start at {next} and an end of at most {data}"
            )));
        }
        let dtype = stored_type(&raw.dtype).ok_or_else(|| {
            let known: Vec<&str> = TYPES.iter().map(|entry| entry.0).collect();
            wrong(format!("dtype is `{}`, expected one of {}", raw.dtype, known.join(", ")))
        })?;
        let bytes = bytes_of(dtype, &raw.shape).ok_or_else(|| {
            wrong(format!("shape {:?} has more elements than memory can address", raw.shape))
        })?;
        if to - from != bytes {
            let (shape, dtype) = (&raw.shape, &raw.dtype);
            return Err(wrong(format!("{dtype} {shape:?} takes {bytes} bytes, the file has {}", to - from)));
        }
        next = to;
        // No larger than the file's length, a usize; dimensions divide it or stand beside a zero.
        let range = start + from as usize..start + to as usize;
        let shape = raw.shape.iter().map(|d| usize::try_from(*d).unwrap_or(usize::MAX)).collect();
        entries.push(Entry { name, dtype, shape, range });
    }
    if next != data {
        let problem = format!("its tensors take {next} bytes, the file has {data} behind the header");
        return Err(header(problem));
    }
    Ok(entries)
}

fn refuse_twins(raw: &mut [(String, Raw)]) -> Result<(), ModelError> {
    raw.sort_by(|a, b| a.0.cmp(&b.0));
    match raw.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => {
            let [first, second] = [pair[0].1.data_offsets[0], pair[1].1.data_offsets[0]];
            Err(malformed(&pair[0].0, format!("stands twice, with data at {first} and at {second}")))
        }
        None => Ok(()),
    }
}

/// Bytes by type and shape. A zero does not hide an absurd dimension beside it.
fn bytes_of(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let size = dtype.size().unwrap_or(1) as u64;
    let bound = shape.iter().try_fold(size, |n, d| n.checked_mul((*d).max(1)))?;
    isize::try_from(bound).ok()?;
    Some(if shape.contains(&0) { 0 } else { bound })
}

fn malformed(tensor: &str, problem: String) -> ModelError {
    ModelError::Malformed { subject: format!("tensor `{tensor}`"), problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(file: &[u8]) -> Result<Vec<Entry>, ModelError> {
        let json = place(&file[..file.len().min(LENGTH_BYTES)], file.len())?;
        entries(&file[json.clone()], json.end, file.len())
    }

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend(json.as_bytes());
        file.extend(vec![0; data]);
        file
    }

    #[test]
    fn tensors_are_found_where_the_header_says_in_any_order() {
        let json = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[3],"data_offsets":[8,14]},
            "a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"e":{"dtype":"I64","shape":[0,4],"data_offsets":[14,14]},
            "s":{"dtype":"U8","shape":[],"data_offsets":[14,15]}}  "#;
        let bytes = file(json, 15);
        let entries = read(&bytes).unwrap();
        let start = 8 + json.len();
        let found: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.range.clone())).collect();
        assert_eq!(
            found,
            [
                ("a", start..start + 8),
                ("b", start + 8..start + 14),
                ("e", start + 14..start + 14),
                ("s", start + 14..start + 15)
            ]
        );
        assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
    }

    #[test]
    fn every_broken_header_is_refused_with_its_numbers() {
        let one = |body: &str| format!(r#"{{"w":{{{body}}}}}"#);
        let good = r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#;
        assert!(read(&file(&one(good), 8)).is_ok());
        for (bytes, expect) in [
            (vec![1, 2, 3], "at least 8 bytes, the file has 3"),
            (u64::MAX.to_le_bytes().to_vec(), "at most 100000000"),
            (99_u64.to_le_bytes().to_vec(), "claims 99 bytes, the file has 0"),
            (file("[]", 0), "expected an object of tensors"),
            (file("{", 0), "is not the JSON expected"),
            (file(r#"{"__metadata__":{"a":1}}"#, 0), "expected a string"),
            (file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "duplicate field `__metadata__`"),
            (file(&one(r#""dtype":"F32","shape":[-2],"data_offsets":[0,8]"#), 8), "tensor `w`"),
            (file(&one(r#""dtype":"Q4","shape":[2],"data_offsets":[0,8]"#), 8), "dtype is `Q4`"),
            (
                file(&one(r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#), 8),
                "takes 12 bytes, the file has 8",
            ),
            (file(&one(r#""dtype":"F32","shape":[2],"data_offsets":[4,12]"#), 12), "expected a start at 0"),
            (file(&one(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#), 8), "data offsets are 8 to 0"),
            (file(&one(good), 7), "an end of at most 7"),
            (file(&one(good), 9), "the file has 9 behind the header"),
            (
                file(&one(r#""dtype":"F32","shape":[4611686018427387904,2],"data_offsets":[0,8]"#), 8),
                "more elements than memory",
            ),
            (file(&format!(r#"{{"w":{{{good}}},"w":{{{good}}}}}"#), 8), "`w`: stands twice"),
            (
                file(&format!(r#"{{"w":{{{good}}},"v":{{{good}}}}}"#), 8),
                "data offsets are 0 to 8, expected a start at 8",
            ),
        ] {
            let error = read(&bytes).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}: expected `{expect}`");
        }
    }

    #[test]
    fn names_of_types_are_the_librarys() {
        for (name, dtype) in TYPES {
            let library: safetensors::Dtype = serde_json::from_value(name.into()).unwrap();
            assert_eq!(library.bitsize(), 8 * dtype.size().unwrap_or(1), "{name}");
            assert_eq!(stored_type_name(dtype), Some(name));
        }
    }
}
