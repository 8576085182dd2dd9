//! Tensors at half the bytes: f32 whose values are all bfloat16 are kept as their upper halves, exactly.
//!
//! What a device computes may stay there; then it costs the host nothing. Values are rounded where they leave a segment ([`round_to_bf16`]), never here: what a tensor is worth does not
//! depend on who holds it.
//! Not here: the budget (`store`), files (`file`).

use crate::error::ExecError;
use half::bf16;
use halfstep_compute::cuda::CudaHalves;
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

/// A tensor as carries hold it.
#[derive(Debug, Clone)]
pub enum Carried {
    /// As it came.
    Whole(Arc<Tensor>),
    /// f32 whose lower halves are 0.
    Halves(Halves),
    /// The same, on the device that made them.
    OnDevice(OnDevice),
}

/// f32 that are all bfloat16, on a device.
#[derive(Debug, Clone)]
pub struct OnDevice {
    /// Dimensions; their product is the number of values.
    pub dims: Vec<usize>,
    /// The upper half of each.
    pub values: Arc<CudaHalves>,
}

/// f32 that are all bfloat16.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Halves {
    /// Dimensions; their product is the number of values.
    pub dims: Vec<usize>,
    /// The upper half of each.
    pub values: Arc<Vec<u16>>,
}

impl Carried {
    /// At half the bytes if `precision` allows and nothing is lost.
    pub fn new(tensor: Arc<Tensor>, precision: CarryPrecision) -> Self {
        match (precision, &tensor.data) {
            (CarryPrecision::Bf16, Data::F32(values)) if values.iter().all(|x| x.to_bits() & 0xffff == 0) => {
                let values = values.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
                Self::halves(tensor.shape.clone(), values)
            }
            _ => Self::Whole(tensor),
        }
    }

    /// Upper halves of f32 whose lower halves are 0.
    pub fn halves(dims: Vec<usize>, values: Vec<u16>) -> Self {
        Self::Halves(Halves { dims, values: Arc::new(values) })
    }

    /// The host's memory of its elements.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Whole(tensor) => tensor.bytes(),
            Self::Halves(halves) => size_of_val(halves.values.as_slice()),
            Self::OnDevice(_) => 0,
        }
    }

    /// Elements.
    pub(super) fn elements(&self) -> usize {
        match self {
            Self::Whole(tensor) => tensor.len(),
            Self::Halves(halves) => halves.values.len(),
            Self::OnDevice(there) => there.values.len(),
        }
    }

    /// Type of the elements as they are kept.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Whole(tensor) => tensor.dtype(),
            Self::Halves(_) | Self::OnDevice(_) => Dtype::Bf16,
        }
    }

    /// Dimensions.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Whole(tensor) => &tensor.shape,
            Self::Halves(halves) => &halves.dims,
            Self::OnDevice(there) => &there.dims,
        }
    }

    /// The same in the host's memory.
    ///
    /// # Errors
    /// `Device` if it is on one that fails.
    pub fn on_host(self) -> Result<Self, ExecError> {
        match self {
            Self::OnDevice(OnDevice { dims, values }) => Ok(Self::halves(dims, values.download()?)),
            here => Ok(here),
        }
    }

    /// The tensor: what it was made from.
    ///
    /// # Errors
    /// As [`Self::on_host`].
    pub fn tensor(self) -> Result<Arc<Tensor>, ExecError> {
        let widened = |dims, values: &[u16]| {
            let data = Data::F32(values.iter().map(|half| whole(*half)).collect());
            Arc::new(Tensor { shape: dims, data })
        };
        Ok(match self {
            Self::Whole(tensor) => tensor,
            Self::Halves(Halves { dims, values }) => widened(dims, &values),
            Self::OnDevice(OnDevice { dims, values }) => widened(dims, &values.download()?),
        })
    }

    /// Largest absolute value; NaN if any is, or if it is not f32.
    pub fn peak(&self) -> f32 {
        match self {
            Self::Whole(tensor) => tensor.as_f32().map_or(f32::NAN, peak),
            Self::Halves(halves) => whole(halves.values.iter().fold(0, |most, half| most.max(half & 0x7fff))),
            Self::OnDevice(there) => there.values.peak(),
        }
    }
}

/// Largest absolute value; NaN if any entry is NaN.
pub fn peak(values: &[f32]) -> f32 {
    // Integer comparison of magnitudes vectorises and keeps NaN largest.
    let bits = values.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    f32::from_bits(bits)
}

/// The f32 with this upper half.
fn whole(half: u16) -> f32 {
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
        let kept = Carried::new(Arc::clone(&tensor), CarryPrecision::Bf16);
        assert_eq!((kept.dtype(), kept.bytes()), (Dtype::Bf16, 2 * 65536));
        let back = kept.tensor().unwrap();
        let bits = |tensor: &Tensor| tensor.as_f32().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!((&back.shape, bits(&back)), (&tensor.shape, bits(&tensor)));
    }

    #[test]
    fn peaks_of_halves_are_those_of_their_values() {
        for values in
            [vec![0.5, -3.0, 2.0], vec![-0.0], vec![1.0, f32::NEG_INFINITY], vec![1.0, f32::NAN, 2.0]]
        {
            let tensor = Arc::new(Tensor::f32(vec![values.len()], values.clone()).unwrap());
            let halves = Carried::new(Arc::clone(&tensor), CarryPrecision::Bf16);
            assert_eq!(halves.dtype(), Dtype::Bf16);
            let (found, expected) = (halves.peak(), peak(&values));
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{values:?}: {found}");
            assert_eq!(Carried::Whole(tensor).peak().to_bits(), expected.to_bits());
        }
        let integers = Arc::new(Tensor::new(vec![1], Data::I64(vec![1])).unwrap());
        assert!(Carried::Whole(integers).peak().is_nan());
    }

    #[test]
    fn one_value_that_is_no_bfloat16_keeps_the_tensor_whole() {
        let tensor = Arc::new(Tensor::f32(vec![3], vec![1.0, 0.1, 2.0]).unwrap());
        assert_eq!(Carried::new(Arc::clone(&tensor), CarryPrecision::Bf16).dtype(), Dtype::F32);
        let exact = Arc::new(Tensor::f32(vec![3], vec![1.0, 0.5, 2.0]).unwrap());
        assert_eq!(Carried::new(Arc::clone(&exact), CarryPrecision::F32).dtype(), Dtype::F32);
        let integers = Arc::new(Tensor::new(vec![2], Data::I64(vec![1, 2])).unwrap());
        assert_eq!(Carried::new(integers, CarryPrecision::Bf16).dtype(), Dtype::I64);
    }
}
