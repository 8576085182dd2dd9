//! f32 as their upper halves, bfloat16, and back.
//!
//! Twins of `cu/halves.cu`.

use half::bf16;

/// Every value rounded to bfloat16: to nearest, ties to even, beyond the largest to infinity; a NaN stays one.
pub fn narrow(values: &[f32]) -> Vec<u16> {
    values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect()
}

/// The f32 with these upper halves.
pub fn widen(halves: &[u16]) -> Vec<f32> {
    halves.iter().map(|half| f32::from_bits(u32::from(*half) << 16)).collect()
}
