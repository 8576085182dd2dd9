//! Tensors in transit to tensors an engine takes, and back. Lengths are checked: the bytes may come from a network.

use half::{bf16, f16};
use halfstep_model::{Data, Tensor};
use halfstep_work::{Failure, FailureClass, InputTensor, ScalarKind};
use std::ops::Range;

/// A tensor as it travels.
pub(crate) fn sent(name: String, tensor: &Tensor) -> InputTensor {
    let kind = match &tensor.data {
        Data::F32(_) => ScalarKind::F32,
        Data::F64(_) => ScalarKind::F64,
        Data::I64(_) => ScalarKind::I64,
        Data::I32(_) => ScalarKind::I32,
        Data::I8(_) => ScalarKind::I8,
        Data::U8(_) => ScalarKind::U8,
        Data::Bool(_) => ScalarKind::Bool,
    };
    InputTensor { name, kind, shape: tensor.shape.clone(), bytes: tensor.data.to_le_bytes().into() }
}

/// Some rows of a matrix of floats `[_, cols]` as it travels, in f32; `None` if it has other elements, or not these rows.
pub(crate) fn rows(input: &InputTensor, cols: usize, rows: Range<usize>) -> Option<Vec<f32>> {
    let at = |row: usize| row.checked_mul(cols)?.checked_mul(input.kind.size());
    let bytes = input.bytes.get(at(rows.start)?..at(rows.end)?)?;
    floats(input.kind, bytes)
}

fn each<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|c| f(*c)).collect()
}

/// Half-precision numbers are computed with as f32, which holds them exactly. `None` for what else there is.
fn floats(kind: ScalarKind, bytes: &[u8]) -> Option<Vec<f32>> {
    match kind {
        ScalarKind::F32 => Some(each(bytes, f32::from_le_bytes)),
        ScalarKind::F16 => Some(each(bytes, |b| f16::from_le_bytes(b).to_f32())),
        ScalarKind::Bf16 => Some(each(bytes, |b| bf16::from_le_bytes(b).to_f32())),
        _ => None,
    }
}

/// # Errors
/// `BadInput` if the byte count does not match the shape.
pub(crate) fn tensor(input: &InputTensor) -> Result<Tensor, Failure> {
    let bytes = &input.bytes;
    if !bytes.len().is_multiple_of(input.kind.size()) {
        return Err(Failure::new(
            FailureClass::BadInput,
            format!("tensor `{}`: {} bytes are no whole {:?} elements", input.name, bytes.len(), input.kind),
        ));
    }
    let data = match input.kind {
        ScalarKind::F32 | ScalarKind::F16 | ScalarKind::Bf16 => {
            Data::F32(floats(input.kind, bytes).unwrap_or_default())
        }
        ScalarKind::F64 => Data::F64(each(bytes, f64::from_le_bytes)),
        ScalarKind::I64 => Data::I64(each(bytes, i64::from_le_bytes)),
        ScalarKind::I32 => Data::I32(each(bytes, i32::from_le_bytes)),
        ScalarKind::I8 => Data::I8(each(bytes, i8::from_le_bytes)),
        ScalarKind::U8 => Data::U8(bytes.to_vec()),
        ScalarKind::Bool => Data::Bool(bytes.iter().map(|b| *b != 0).collect()),
    };
    Tensor::new(input.shape.clone(), data)
        .map_err(|e| Failure::new(FailureClass::BadInput, format!("tensor `{}`: {e}", input.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(kind: ScalarKind, bytes: Vec<u8>) -> InputTensor {
        InputTensor { name: "w".into(), kind, shape: vec![3, 2], bytes: bytes.into() }
    }

    #[test]
    fn rows_are_those_of_the_whole_tensor_and_others_are_refused() {
        let values = [1.5, -2.0, 0.25, 3.0, -0.5, 8.0];
        let f32s = values.iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
        let halves = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let brains = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        for (kind, bytes) in [(ScalarKind::F32, f32s), (ScalarKind::F16, halves), (ScalarKind::Bf16, brains)]
        {
            let input = stored(kind, bytes);
            assert_eq!(tensor(&input).unwrap().data, Data::F32(values.to_vec()), "{kind:?}");
            assert_eq!(rows(&input, 2, 1..3).unwrap(), values[2..], "{kind:?}");
            assert_eq!(rows(&input, 2, 0..0).unwrap(), [0.0; 0], "{kind:?}");
            assert_eq!((rows(&input, 2, 2..4), rows(&input, usize::MAX, 1..2)), (None, None), "{kind:?}");
        }
        assert_eq!(rows(&stored(ScalarKind::I32, vec![0; 24]), 2, 0..1), None);
    }
}
