//! A carry as bytes: the live tensors of one shard at a segment boundary, for another node.
//!
//! Layout: magic, version u32, range u32, segment u32, shard u32, little-endian; then a safetensors file whose names begin
//! with `f/` (original model) or `q/` (quantized stream).
//! Not here: which tensors must be there (`replay`), checksums of transport (`proto`).

use crate::{failure, transit};
use bytes::{Bytes, BytesMut};
use halfstep_exec::Stream;
use halfstep_model::Tensor;
use halfstep_proto::tensors;
use halfstep_work::{Failure, FailureClass, InputTensor, RangeId, SegmentId, ShardId};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"HSLIVE\r\n";
const VERSION: u32 = 1;
const HEADER: usize = 24;

/// One live tensor.
pub type Live = (Stream, String, Arc<Tensor>);

/// Whose carry, after which segment.
pub type Place = (RangeId, SegmentId, ShardId);

/// Bytes of a carry.
///
/// # Errors
/// `Internal` if the tensors are not storable.
pub fn encode(place: Place, live: &[Live]) -> Result<Bytes, Failure> {
    let named: Vec<InputTensor> = live
        .iter()
        .map(|(stream, name, tensor)| transit::sent(format!("{}{name}", prefix(*stream)), tensor))
        .collect();
    let body = tensors::encode(&named).map_err(failure::internal)?;
    let mut out = BytesMut::with_capacity(HEADER + body.len());
    out.extend_from_slice(&header(place));
    out.extend_from_slice(&body);
    Ok(out.freeze())
}

/// The tensors of a carry.
///
/// # Errors
/// `Damaged` for bytes that are no carry of this place.
pub fn decode(bytes: &Bytes, place: Place) -> Result<Vec<Live>, Failure> {
    let (range, segment, shard) = place;
    let wrong = |problem: String| {
        Failure::new(FailureClass::Damaged, format!("carry of {range}, {segment}, {shard}: {problem}"))
    };
    let expected = header(place);
    match bytes.get(..HEADER) {
        Some(found) if found == expected => {}
        Some(found) => return Err(wrong(format!("begins with {found:?}, expected {expected:?}"))),
        None => return Err(wrong(format!("{} bytes, expected {HEADER} or more", bytes.len()))),
    }
    let named = tensors::decode(&bytes.slice(HEADER..)).map_err(|error| wrong(error.to_string()))?;
    let read = |input: &InputTensor| {
        let found = [Stream::FullPrecision, Stream::Quantized]
            .into_iter()
            .find_map(|stream| Some((stream, input.name.strip_prefix(prefix(stream))?)));
        let (stream, name) =
            found.ok_or_else(|| wrong(format!("tensor `{}` is of no stream", input.name)))?;
        let tensor = transit::tensor(input).map_err(|error| wrong(error.message))?;
        Ok((stream, name.to_owned(), Arc::new(tensor)))
    };
    named.iter().map(read).collect()
}

fn header((range, segment, shard): Place) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..8].copy_from_slice(MAGIC);
    for (at, value) in [VERSION, range.0, segment.0, shard.0].into_iter().enumerate() {
        out[8 + 4 * at..12 + 4 * at].copy_from_slice(&value.to_le_bytes());
    }
    out
}

fn prefix(stream: Stream) -> &'static str {
    match stream {
        Stream::FullPrecision => "f/",
        Stream::Quantized => "q/",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_model::Data;

    const PLACE: Place = (RangeId(1), SegmentId(2), ShardId(3));

    fn live() -> Vec<Live> {
        let tensor = |shape: &[usize], data| Arc::new(Tensor::new(shape.to_vec(), data).unwrap());
        vec![
            (Stream::FullPrecision, "x".into(), tensor(&[1, 2], Data::F32(vec![f32::NAN, -0.0]))),
            (Stream::Quantized, "x".into(), tensor(&[], Data::I64(vec![-7]))),
            (Stream::FullPrecision, "q/ü".into(), tensor(&[2], Data::Bool(vec![true, false]))),
        ]
    }

    #[test]
    fn what_is_sent_arrives() {
        let back = decode(&encode(PLACE, &live()).unwrap(), PLACE).unwrap();
        let flat = |all: &[Live]| -> Vec<_> {
            all.iter().map(|(s, n, t)| (*s, n.clone(), t.shape.clone(), t.data.to_le_bytes())).collect()
        };
        assert_eq!(flat(&back), flat(&live()));
    }

    #[test]
    fn damaged_and_foreign_bytes_are_refused() {
        let good = encode(PLACE, &live()).unwrap();
        for len in 0..good.len() {
            assert_eq!(decode(&good.slice(..len), PLACE).unwrap_err().class, FailureClass::Damaged, "{len}");
        }
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 0x10;
            // Payload bytes are under the transport's hash; the head is not to be mistaken for another.
            assert!(decode(&bad.into(), PLACE).is_err() || at >= HEADER, "byte {at}");
        }
        let other = (RangeId(1), SegmentId(2), ShardId(4));
        assert!(decode(&good, other).unwrap_err().message.contains("shard-4"));
    }
}
