//! The values that stored scales can have.
//!
//! Rounding is learned against the scale that is shipped: a scale is brought to its stored type before, never after.
//! Not here: choosing scales (`range`).

use crate::Encodings;
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
}

impl ScaleType {
    /// The nearest positive value of this type, half to even; its smallest or largest where the scale lies beyond.
    pub fn nearest(self, scale: f32) -> f32 {
        match self {
            Self::F32 => scale,
            Self::F16 => {
                let nearest = f16::from_f32(scale);
                nearest.clamp(f16::MIN_POSITIVE_SUBNORMAL, f16::MAX).to_f32()
            }
            Self::Bf16 => bf16::from_f32(scale).clamp(bf16::MIN_POSITIVE, bf16::MAX).to_f32(),
        }
    }
}

impl Encodings {
    /// Brings every scale to its stored type. Zero points stay: they are whole multiples of whatever the scale is.
    pub fn store_scales_as(&mut self, kind: ScaleType) {
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
        for kind in [ScaleType::F16, ScaleType::Bf16] {
            for scale in [1e-30, 6e-8, 0.02, 1.0, 3e38] {
                let stored = kind.nearest(scale);
                assert!(stored > 0.0 && stored.is_finite(), "{kind:?} {scale}");
                assert_eq!(kind.nearest(stored), stored, "once is enough");
            }
        }
    }
}
