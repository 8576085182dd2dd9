//! Little-endian floats of any width into f32.
//!
//! Not here: integers, and packed weights (`quantized`).

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::Dtype;

/// Elements converted at once: enough for the vector instructions, little enough for the stack.
const RUN: usize = 1024;

/// The elements of `raw` as f32; none if the type is no float. Doubles are rounded to nearest.
pub(super) fn to_f32(dtype: Dtype, raw: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => raw.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F64 => raw.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        Dtype::F16 => halves(raw, f16::from_le_bytes, |run: &[f16], out| run.convert_to_f32_slice(out)),
        Dtype::Bf16 => halves(raw, bf16::from_le_bytes, |run: &[bf16], out| run.convert_to_f32_slice(out)),
        _ => return None,
    })
}

fn halves<T: Copy + Default>(raw: &[u8], read: fn([u8; 2]) -> T, convert: fn(&[T], &mut [f32])) -> Vec<f32> {
    let source = raw.as_chunks::<2>().0;
    let mut out = vec![0.0; source.len()];
    let mut buffer = [T::default(); RUN];
    for (run, out) in source.chunks(RUN).zip(out.chunks_mut(RUN)) {
        buffer.iter_mut().zip(run).for_each(|(value, bytes)| *value = read(*bytes));
        convert(&buffer[..run.len()], out);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_half_values_convert_exactly() {
        let raw: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let (halves, brains) = (to_f32(Dtype::F16, &raw).unwrap(), to_f32(Dtype::Bf16, &raw).unwrap());
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            let index = usize::from(bits);
            assert!(halves[index] == half.to_f32() || half.is_nan() && halves[index].is_nan(), "{half}");
            assert!(brains[index] == brain.to_f32() || brain.is_nan() && brains[index].is_nan(), "{brain}");
        }
    }
}
