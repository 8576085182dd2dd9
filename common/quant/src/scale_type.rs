//! The values that stored scales can have.
//!
//! Rounding is learned against the scale that is shipped: a scale is brought to its stored type before, never after.
//! Not here: choosing scales (`range`).

use crate::{Encodings, Scheme};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Element type of scales in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleType {
    /// 32 bits.
    #[default]
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Half precision; on asymmetric grids of at most 4 bits with so few digits that `scale * zero_point` is half
    /// precision too.
    F16AndMinimum,
}

/// Significant bits of `F16AndMinimum`: with the 4 of the largest zero point they make the 11 of half precision.
const SHORT_BITS: u32 = 7;
/// The largest such scale whose product with 15 half precision holds.
const SHORT_MAX: f32 = 4352.0;

impl ScaleType {
    /// The type of scales of a grid of this scheme.
    pub fn of(self, scheme: Scheme) -> Self {
        if self == Self::F16AndMinimum && scheme.is_symmetric() { Self::F16 } else { self }
    }

    /// The nearest positive value of this type, half to even; its smallest or largest where the scale lies beyond.
    pub fn nearest(self, scale: f32) -> f32 {
        match self {
            Self::F32 => scale,
            Self::F16 => {
                let nearest = f16::from_f32(scale);
                nearest.clamp(f16::MIN_POSITIVE_SUBNORMAL, f16::MAX).to_f32()
            }
            Self::Bf16 => bf16::from_f32(scale).clamp(bf16::MIN_POSITIVE, bf16::MAX).to_f32(),
            Self::F16AndMinimum => short(scale),
        }
    }
}

fn short(scale: f32) -> f32 {
    let smallest = f16::MIN_POSITIVE_SUBNORMAL.to_f32();
    let exponent = |normal: f32| normal.to_bits() >> 23;
    let scale = scale.clamp(smallest, SHORT_MAX);
    // The last digit that is kept, a power of two.
    let step = (exponent(scale) + 1 - SHORT_BITS).max(exponent(smallest));
    let step = f32::from_bits(step << 23);
    (scale / step).round_ties_even() * step
}

impl Encodings {
    /// Brings every scale to its stored type. Zero points stay: they are whole multiples of whatever the scale is.
    pub fn store_scales_as(&mut self, kind: ScaleType) {
        let kind = kind.of(self.scheme);
        self.scale.iter_mut().for_each(|scale| *scale = kind.nearest(*scale));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_become_the_nearest_value_of_their_type() {
        assert_eq!(ScaleType::F32.nearest(0.1), 0.1);
        // 0.1 lies between 1638 and 1639 sixteen-thousandths in half precision.
        assert_eq!(ScaleType::F16.nearest(0.1), 1638.0 / 16384.0);
        assert_eq!(ScaleType::Bf16.nearest(0.1), 205.0 / 2048.0);
        for kind in [ScaleType::F16, ScaleType::Bf16, ScaleType::F16AndMinimum] {
            for scale in [1e-30, 6e-8, 0.02, 1.0, 3e38] {
                let stored = kind.nearest(scale);
                assert!(stored > 0.0 && stored.is_finite(), "{kind:?} {scale}");
                assert_eq!(kind.nearest(stored), stored, "once is enough");
            }
        }
    }
    #[test]
    fn short_scales_and_all_their_minima_are_half_precision_and_near() {
        for bits in (0..f32::MAX.to_bits()).step_by(9973) {
            let scale = f32::from_bits(bits);
            let stored = ScaleType::F16AndMinimum.nearest(scale);
            for zero_point in 1..=15_u8 {
                let minimum = stored * f32::from(zero_point);
                assert_eq!(
                    f16::from_f32(minimum).to_f32(),
                    minimum,
                    "{scale} as {stored}, times {zero_point}"
                );
            }
            if (1e-5..4352.0).contains(&scale) {
                assert!((stored - scale).abs() <= scale / 128.0, "{scale} as {stored}");
            }
        }
        assert_eq!(ScaleType::F16AndMinimum.of(Scheme::Symmetric), ScaleType::F16);
        assert_eq!(ScaleType::F16AndMinimum.of(Scheme::Asymmetric), ScaleType::F16AndMinimum);
    }
}
