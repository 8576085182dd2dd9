//! Tensors at half the bytes: f32 whose values are all bfloat16 are kept as their upper halves, exactly.
//!
//! Values are rounded where they leave a segment ([`round_to_bf16`]), never here: what a tensor is worth does not
//! depend on who holds it.
//! Not here: the budget (`store`), files (`file`).

use half::bf16;
use halfstep_model::decoder::CarryPrecision;
use halfstep_model::{Data, Dtype, Tensor};
use std::sync::Arc;

/// Rounds every f32 to the nearest bfloat16 (ties to even; beyond the largest, to infinity; a NaN stays one). Other
/// types stay as they are.
pub fn round_to_bf16(tensor: &mut Tensor) {
    if let Data::F32(values) = &mut tensor.data {
        values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }
}

/// A tensor as the store keeps it.
#[derive(Debug, Clone)]
pub(super) enum Kept {
    /// As it came.
    Whole(Arc<Tensor>),
    /// The upper halves of f32 whose lower halves are 0.
    Halves { dims: Vec<usize>, values: Arc<Vec<u16>> },
}

impl Kept {
    /// At half the bytes if `precision` allows and nothing is lost.
    pub(super) fn new(tensor: Arc<Tensor>, precision: CarryPrecision) -> Self {
        match (precision, &tensor.data) {
            (CarryPrecision::Bf16, Data::F32(values)) if values.iter().all(|x| x.to_bits() & 0xffff == 0) => {
                let values = Arc::new(values.iter().map(|x| (x.to_bits() >> 16) as u16).collect());
                Self::Halves { dims: tensor.shape.clone(), values }
            }
            _ => Self::Whole(tensor),
        }
    }

    /// Memory of its elements.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Whole(tensor) => tensor.bytes(),
            Self::Halves { values, .. } => size_of_val(values.as_slice()),
        }
    }

    /// Type of the elements as they are kept.
    pub(super) fn dtype(&self) -> Dtype {
        match self {
            Self::Whole(tensor) => tensor.dtype(),
            Self::Halves { .. } => Dtype::Bf16,
        }
    }

    /// Dimensions.
    pub(super) fn dims(&self) -> &[usize] {
        match self {
            Self::Whole(tensor) => &tensor.shape,
            Self::Halves { dims, .. } => dims,
        }
    }

    /// The tensor that was put.
    pub(super) fn tensor(self) -> Arc<Tensor> {
        match self {
            Self::Whole(tensor) => tensor,
            Self::Halves { dims, values } => {
                let data = Data::F32(values.iter().map(|half| whole(*half)).collect());
                Arc::new(Tensor { shape: dims, data })
            }
        }
    }
}

/// The f32 with this upper half.
pub(super) fn whole(half: u16) -> f32 {
    f32::from_bits(u32::from(half) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(x: f32) -> f32 {
        let mut tensor = Tensor::f32(vec![1], vec![x]).unwrap();
        round_to_bf16(&mut tensor);
        tensor.as_f32().unwrap()[0]
    }

    #[test]
    fn rounding_is_to_nearest_with_ties_to_even() {
        let ulp = 2f32.powi(-7);
        for (x, want) in [
            (1.0, 1.0),
            (1.0 + ulp, 1.0 + ulp),
            (1.0 + 0.5 * ulp, 1.0),
            (1.0 + 0.500_1 * ulp, 1.0 + ulp),
            (1.0 + 1.5 * ulp, 1.0 + 2.0 * ulp),
            (-1.0 - 1.5 * ulp, -1.0 - 2.0 * ulp),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
            (1e-45, 0.0),
        ] {
            assert_eq!(rounded(x), want, "{x}");
        }
        assert!(rounded(-0.0).is_sign_negative());
        for bits in [0x7f80_0001, 0x7fc0_0000, 0xffff_ffff_u32] {
            let got = rounded(f32::from_bits(bits));
            assert!(got.is_nan() && got.to_bits() & 0xffff == 0);
        }
    }

    #[test]
    fn every_half_comes_back_as_it_was() {
        let values: Vec<f32> = (0..=u16::MAX).map(whole).collect();
        let tensor = Arc::new(Tensor::f32(vec![256, 256], values).unwrap());
        let kept = Kept::new(Arc::clone(&tensor), CarryPrecision::Bf16);
        assert_eq!((kept.dtype(), kept.bytes()), (Dtype::Bf16, 2 * 65536));
        let back = kept.tensor();
        let bits = |tensor: &Tensor| tensor.as_f32().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!((&back.shape, bits(&back)), (&tensor.shape, bits(&tensor)));
    }

    #[test]
    fn one_value_that_is_no_bfloat16_keeps_the_tensor_whole() {
        let tensor = Arc::new(Tensor::f32(vec![3], vec![1.0, 0.1, 2.0]).unwrap());
        assert_eq!(Kept::new(Arc::clone(&tensor), CarryPrecision::Bf16).dtype(), Dtype::F32);
        let exact = Arc::new(Tensor::f32(vec![3], vec![1.0, 0.5, 2.0]).unwrap());
        assert_eq!(Kept::new(Arc::clone(&exact), CarryPrecision::F32).dtype(), Dtype::F32);
        let integers = Arc::new(Tensor::new(vec![2], Data::I64(vec![1, 2])).unwrap());
        assert_eq!(Kept::new(integers, CarryPrecision::Bf16).dtype(), Dtype::I64);
    }
}
