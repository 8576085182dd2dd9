//! Blobs of roundings: the durable result of one solved chunk, also as a file.
//!
//! Little-endian: magic `HSROUND\n`, version u32, layer u32, chunk u32, bits u8, scheme u8, granularity u8, zero u8,
//! group size u64, rows u64, cols u64; of the report three f64 and four u64; entries u64, a scale f32 and a zero point
//! i32 each; grid integers less the smallest of the grid, u8 up to 8 bits, else u16; CRC32C u32 of all before it.
//! The same rounding gives the same bytes. Integers outside the grid can be neither written nor read.

use crate::WireError;
use bytes::Bytes;
use halfstep_quant::{Encodings, Granularity, Scheme};
use halfstep_work::{ChunkId, ChunkReport, LayerId, Rounding};

/// The first bytes of every rounding.
pub const MAGIC: &[u8; 8] = b"HSROUND\n";
const VERSION: u32 = 1;
/// Bytes around entries and integers.
const FIXED: usize = 8 + 3 * 4 + 4 + 3 * 8 + 7 * 8 + 8 + 4;

/// Writes a rounding.
///
/// # Errors
/// If it contradicts itself: encodings that are not valid, integers outside the grid or not as many as weights.
pub fn encode(rounding: &Rounding) -> Result<Bytes, WireError> {
    check(rounding)?;
    let encodings = &rounding.encodings;
    let entries = encodings.scale.len();
    let mut out = Vec::with_capacity(FIXED + 8 * entries + width(encodings.bits) * rounding.q.len());
    out.extend_from_slice(MAGIC);
    for number in [VERSION, rounding.layer.0, rounding.chunk.0] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    let (granularity, group_size) = match encodings.granularity {
        Granularity::PerTensor => (0, 0),
        Granularity::PerChannel => (1, 0),
        Granularity::PerGroup { group_size } => (2, group_size),
    };
    out.extend_from_slice(&[encodings.bits, scheme_number(encodings.scheme), granularity, 0]);
    for number in [group_size, encodings.rows, encodings.cols] {
        out.extend_from_slice(&(number as u64).to_le_bytes());
    }
    put_report(&mut out, &rounding.report);
    out.extend_from_slice(&(entries as u64).to_le_bytes());
    encodings.scale.iter().for_each(|scale| out.extend_from_slice(&scale.to_le_bytes()));
    encodings.zero_point.iter().for_each(|zero| out.extend_from_slice(&zero.to_le_bytes()));
    put_integers(&mut out, rounding);
    out.extend_from_slice(&crc32c::crc32c(&out).to_le_bytes());
    Ok(Bytes::from(out))
}

/// Reads a rounding.
///
/// # Errors
/// Anything but the bytes of a rounding that does not contradict itself.
pub fn decode(blob: &[u8]) -> Result<Rounding, WireError> {
    let Some((body, crc)) = blob.split_last_chunk::<4>() else {
        return Err(damaged("ends early"));
    };
    let mut cursor = Cursor(body);
    if cursor.array()? != *MAGIC {
        return Err(damaged("does not begin as one"));
    }
    let version = cursor.u32()?;
    if version != VERSION {
        return Err(damaged(format!("expected version {VERSION}, found {version}")));
    }
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return Err(damaged("its checksum does not match"));
    }
    let (layer, chunk) = (LayerId(cursor.u32()?), ChunkId(cursor.u32()?));
    let mut encodings = read_shape(&mut cursor)?;
    let report = read_report(&mut cursor)?;
    let entries = cursor.count()?;
    encodings.scale = cursor.elements(entries, f32::from_le_bytes)?;
    encodings.zero_point = cursor.elements(entries, i32::from_le_bytes)?;
    let q = read_integers(&mut cursor, &encodings)?;
    if !cursor.0.is_empty() {
        return Err(damaged(format!("{} bytes too many", cursor.0.len())));
    }
    let rounding = Rounding { layer, chunk, encodings, q, report };
    check(&rounding)?;
    Ok(rounding)
}

fn damaged(problem: impl Into<String>) -> WireError {
    WireError::new("blob of a rounding", problem)
}

/// Bytes of an integer. Every grid fits: it has at most 2^16 integers (bit widths are 2 to 8, and 16).
fn width(bits: u8) -> usize {
    if bits <= 8 { 1 } else { 2 }
}

fn check(rounding: &Rounding) -> Result<(), WireError> {
    let wrong = |problem: String| {
        WireError::new(format!("rounding of {}, {}", rounding.layer, rounding.chunk), problem)
    };
    let encodings = &rounding.encodings;
    encodings.validate().map_err(|error| wrong(error.to_string()))?;
    let expected = encodings.rows * encodings.cols;
    if rounding.q.len() != expected {
        return Err(wrong(format!("expected {expected} integers, found {}", rounding.q.len())));
    }
    let range = encodings.qmin()..=encodings.qmax();
    match rounding.q.iter().find(|q| !range.contains(q)) {
        Some(q) => Err(wrong(format!("integer {q} is outside {range:?}"))),
        None => Ok(()),
    }
}

fn scheme_number(scheme: Scheme) -> u8 {
    match scheme {
        Scheme::Symmetric => 0,
        Scheme::SymmetricStrict => 1,
        Scheme::Asymmetric => 2,
    }
}

fn put_report(out: &mut Vec<u8>, report: &ChunkReport) {
    for value in [report.objective_nearest, report.objective, report.signal] {
        out.extend_from_slice(&value.to_le_bytes());
    }
    for count in [report.rounded_away, report.guarded_rows, report.dead_inputs, report.zero_rows] {
        out.extend_from_slice(&count.to_le_bytes());
    }
}

fn put_integers(out: &mut Vec<u8>, rounding: &Rounding) {
    let (qmin, bits) = (rounding.encodings.qmin(), rounding.encodings.bits);
    // `check` has seen every integer: the differences fit.
    let above = rounding.q.iter().map(|q| (q - qmin) as u16);
    if width(bits) == 1 {
        out.extend(above.map(|q| q as u8));
    } else {
        above.for_each(|q| out.extend_from_slice(&q.to_le_bytes()));
    }
}

fn read_shape(cursor: &mut Cursor<'_>) -> Result<Encodings, WireError> {
    let [bits, scheme, granularity, reserved] = cursor.array()?;
    let (group_size, rows, cols) = (cursor.count()?, cursor.count()?, cursor.count()?);
    let scheme = match scheme {
        0 => Scheme::Symmetric,
        1 => Scheme::SymmetricStrict,
        2 => Scheme::Asymmetric,
        other => return Err(damaged(format!("scheme {other} means nothing to this version"))),
    };
    let granularity = match (granularity, group_size) {
        (0, 0) => Granularity::PerTensor,
        (1, 0) => Granularity::PerChannel,
        (2, group_size) => Granularity::PerGroup { group_size },
        other => return Err(damaged(format!("granularity {other:?} means nothing to this version"))),
    };
    if reserved != 0 {
        return Err(damaged("a reserved byte is not zero"));
    }
    Ok(Encodings { bits, scheme, granularity, rows, cols, scale: Vec::new(), zero_point: Vec::new() })
}

fn read_report(cursor: &mut Cursor<'_>) -> Result<ChunkReport, WireError> {
    Ok(ChunkReport {
        objective_nearest: f64::from_le_bytes(cursor.array()?),
        objective: f64::from_le_bytes(cursor.array()?),
        signal: f64::from_le_bytes(cursor.array()?),
        rounded_away: u64::from_le_bytes(cursor.array()?),
        guarded_rows: u64::from_le_bytes(cursor.array()?),
        dead_inputs: u64::from_le_bytes(cursor.array()?),
        zero_rows: u64::from_le_bytes(cursor.array()?),
    })
}

fn read_integers(cursor: &mut Cursor<'_>, encodings: &Encodings) -> Result<Vec<i32>, WireError> {
    let weights = encodings.rows.checked_mul(encodings.cols);
    let weights =
        weights.ok_or_else(|| damaged(format!("{} x {} is too large", encodings.rows, encodings.cols)))?;
    let qmin = encodings.qmin();
    if width(encodings.bits) == 1 {
        cursor.elements(weights, |[q]: [u8; 1]| i32::from(q) + qmin)
    } else {
        cursor.elements(weights, |q| i32::from(u16::from_le_bytes(q)) + qmin)
    }
}

/// What has not been read yet.
struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, tail) = self.0.split_first_chunk().ok_or_else(|| damaged("ends early"))?;
        self.0 = tail;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn count(&mut self) -> Result<usize, WireError> {
        let count = u64::from_le_bytes(self.array()?);
        usize::try_from(count).map_err(|_| damaged(format!("{count} is too large")))
    }

    /// Allocates only after it has seen that all of them are there.
    fn elements<const N: usize, T>(
        &mut self,
        n: usize,
        f: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, WireError> {
        let bytes = n.checked_mul(N).filter(|bytes| *bytes <= self.0.len());
        let (head, tail) = self.0.split_at(bytes.ok_or_else(|| damaged("ends early"))?);
        self.0 = tail;
        Ok(head.as_chunks().0.iter().map(|chunk| f(*chunk)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example(bits: u8, scheme: Scheme, granularity: Granularity) -> Rounding {
        let (rows, cols) = (3_usize, 5_usize);
        let entries = match granularity {
            Granularity::PerTensor => 1,
            Granularity::PerChannel => 3,
            Granularity::PerGroup { group_size } => 3 * cols.div_ceil(group_size),
        };
        let zero = if scheme.is_symmetric() { 0 } else { 1 };
        let encodings = Encodings {
            bits,
            scheme,
            granularity,
            rows,
            cols,
            scale: (0..entries).map(|i| 0.25 + i as f32).collect(),
            zero_point: vec![zero; entries],
        };
        let (qmin, qmax) = (encodings.qmin(), encodings.qmax());
        let q = (0..rows * cols).map(|i| if i % 3 == 0 { qmin } else { qmax - (i as i32 % 2) }).collect();
        let report =
            ChunkReport { objective: f64::INFINITY, signal: -0.0, zero_rows: 3, ..Default::default() };
        Rounding { layer: LayerId(7), chunk: ChunkId(2), encodings, q, report }
    }

    #[test]
    fn every_grid_comes_back() {
        let grains =
            [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup { group_size: 2 }];
        for bits in (2..=8).chain([16]) {
            for scheme in [Scheme::Symmetric, Scheme::SymmetricStrict, Scheme::Asymmetric] {
                for granularity in grains {
                    let rounding = example(bits, scheme, granularity);
                    let blob = encode(&rounding).unwrap();
                    assert_eq!(decode(&blob).unwrap(), rounding, "{bits} {scheme} {granularity}");
                    let entries = rounding.encodings.scale.len();
                    assert_eq!(blob.len(), FIXED + 8 * entries + 15 * width(bits));
                }
            }
        }
    }

    /// Files outlive versions: this one must stay readable.
    #[test]
    fn the_layout_is_what_it_was() {
        let blob = encode(&example(4, Scheme::Symmetric, Granularity::PerChannel)).unwrap();
        assert_eq!(&blob[..28], b"HSROUND\n\x01\0\0\0\x07\0\0\0\x02\0\0\0\x04\0\x01\0\0\0\0\0");
        assert_eq!(
            &blob[blob.len() - 19..blob.len() - 4],
            b"\0\x0e\x0f\0\x0f\x0e\0\x0e\x0f\0\x0f\x0e\0\x0e\x0f"
        );
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let blob = encode(&example(3, Scheme::Asymmetric, Granularity::PerGroup { group_size: 4 })).unwrap();
        for bit in 0..blob.len() * 8 {
            let mut changed = blob.to_vec();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&changed).is_err(), "bit {bit}");
        }
        for len in 0..blob.len() {
            assert!(decode(&blob[..len]).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn contradictions_are_neither_written_nor_read() {
        let good = example(4, Scheme::Symmetric, Granularity::PerTensor);
        let mut outside = good.clone();
        outside.q[4] = 8;
        let error = encode(&outside).unwrap_err().to_string();
        assert_eq!(error, "rounding of layer-7, chunk-2: integer 8 is outside -8..=7");
        let mut short = good.clone();
        short.q.pop();
        assert!(encode(&short).unwrap_err().to_string().contains("expected 15 integers, found 14"));
        // An integer beyond the grid under a correct checksum.
        let mut blob = encode(&good).unwrap().to_vec();
        let end = blob.len() - 4;
        blob[end - 1] = 16;
        let crc = crc32c::crc32c(&blob[..end]);
        blob[end..].copy_from_slice(&crc.to_le_bytes());
        assert!(decode(&blob).unwrap_err().to_string().contains("integer 8 is outside"));
    }

    proptest! {
        #[test]
        fn foreign_bytes_under_a_correct_checksum_never_panic(
            tail in prop::collection::vec(any::<u8>(), 0..300),
            head in 0usize..60,
        ) {
            let good = encode(&example(4, Scheme::Symmetric, Granularity::PerTensor)).unwrap();
            let mut blob = good[..head.max(12)].to_vec();
            blob.extend(tail);
            blob.extend(crc32c::crc32c(&blob).to_le_bytes());
            if let Ok(rounding) = decode(&blob) {
                prop_assert_eq!(encode(&rounding).unwrap(), blob);
            }
        }
    }
}
