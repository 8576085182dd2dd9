//! What grid is wanted: bit width, scheme, granularity and how its range is chosen.
//!
//! All of it is plain configuration: it has text forms (`per-group:64`, `percentile:99.9`) that are also its serde form.
//! Not here: scales and zero points, which depend on weights ([`crate::Encodings`]).

use crate::QuantError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which integers a grid has, and where real zero lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// `-2^(b-1) ..= 2^(b-1) - 1`, zero point 0.
    #[default]
    Symmetric,
    /// `-(2^(b-1) - 1) ..= 2^(b-1) - 1`, zero point 0: as many negative as positive integers.
    SymmetricStrict,
    /// `0 ..= 2^b - 1`, zero point in that range.
    Asymmetric,
}

impl Scheme {
    /// Smallest and largest integer at `bits` bits (at most 16; more is treated as 16, fewer than 2 as 2).
    pub fn integer_range(self, bits: u8) -> (i32, i32) {
        let bits = bits.clamp(2, 16);
        let half = 1_i32 << (bits - 1);
        match self {
            Self::Symmetric => (-half, half - 1),
            Self::SymmetricStrict => (1 - half, half - 1),
            Self::Asymmetric => (0, 2 * half - 1),
        }
    }

    /// Whether the zero point is fixed at 0.
    pub fn is_symmetric(self) -> bool {
        self != Self::Asymmetric
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Symmetric => "symmetric",
            Self::SymmetricStrict => "symmetric-strict",
            Self::Asymmetric => "asymmetric",
        })
    }
}

impl FromStr for Scheme {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self, QuantError> {
        match text {
            "symmetric" => Ok(Self::Symmetric),
            "symmetric-strict" => Ok(Self::SymmetricStrict),
            "asymmetric" => Ok(Self::Asymmetric),
            _ => Err(QuantError::Parse {
                what: "scheme",
                text: text.to_owned(),
                expected: "symmetric, symmetric-strict or asymmetric",
            }),
        }
    }
}

/// How encodings are shared among the weights of a `[rows, cols]` matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Granularity {
    /// One encoding for the matrix.
    PerTensor,
    /// One encoding per row (output channel).
    #[default]
    PerChannel,
    /// One encoding per row and run of `group_size` columns; the last run may be shorter.
    PerGroup {
        /// Columns per encoding, at least 1.
        group_size: usize,
    },
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerTensor => f.pad("per-tensor"),
            Self::PerChannel => f.pad("per-channel"),
            Self::PerGroup { group_size } => f.pad(&format!("per-group:{group_size}")),
        }
    }
}

impl FromStr for Granularity {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self, QuantError> {
        match text {
            "per-tensor" => return Ok(Self::PerTensor),
            "per-channel" => return Ok(Self::PerChannel),
            _ => {}
        }
        match text.strip_prefix("per-group:").and_then(|size| size.parse().ok()) {
            Some(0) => Err(QuantError::GroupSize { group_size: 0 }),
            Some(group_size) => Ok(Self::PerGroup { group_size }),
            None => Err(QuantError::Parse {
                what: "granularity",
                text: text.to_owned(),
                expected: "per-tensor, per-channel or per-group:SIZE",
            }),
        }
    }
}

/// How the real range that a grid covers is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RangeEstimator {
    /// All weights are inside the range.
    MinMax,
    /// The range with the smallest (weighted) squared rounding error (arXiv:2004.10568, section 5).
    #[default]
    Mse,
    /// Weights beyond the percentile are clipped.
    Percentile {
        /// In per cent, above 50 and at most 100.
        percentile: f32,
    },
    /// AIMET's `tf_enhanced`: the histogram range with the smallest rounding error plus three times the clipping error.
    Enhanced,
}

impl fmt::Display for RangeEstimator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MinMax => f.pad("min-max"),
            Self::Mse => f.pad("mse"),
            Self::Percentile { percentile } => f.pad(&format!("percentile:{percentile}")),
            Self::Enhanced => f.pad("enhanced"),
        }
    }
}

impl FromStr for RangeEstimator {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self, QuantError> {
        match text {
            "min-max" => return Ok(Self::MinMax),
            "mse" => return Ok(Self::Mse),
            "enhanced" => return Ok(Self::Enhanced),
            _ => {}
        }
        let Some(percentile) = text.strip_prefix("percentile:").and_then(|p| p.parse().ok()) else {
            return Err(QuantError::Parse {
                what: "range estimator",
                text: text.to_owned(),
                expected: "min-max, mse, percentile:PER_CENT or enhanced",
            });
        };
        check_percentile(percentile)?;
        Ok(Self::Percentile { percentile })
    }
}

macro_rules! as_text {
    ($($name:ty),*) => {$(
        impl TryFrom<String> for $name {
            type Error = QuantError;
            fn try_from(text: String) -> Result<Self, QuantError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.to_string()
            }
        }
    )*};
}
as_text!(Granularity, RangeEstimator);

/// The grid wanted for one weight matrix.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GridSpec {
    /// Bit width: 2 to 8, or 16.
    pub bits: u8,
    /// Integers and zero point.
    pub scheme: Scheme,
    /// Sharing of encodings.
    pub granularity: Granularity,
    /// Choice of range.
    pub range: RangeEstimator,
}

impl GridSpec {
    /// Checks that such a grid exists.
    ///
    /// # Errors
    /// `Bits`, `GroupSize` or `Percentile` with the value that is out of range.
    pub fn validate(&self) -> Result<(), QuantError> {
        check_bits(self.bits)?;
        check_granularity(self.granularity)?;
        match self.range {
            RangeEstimator::Percentile { percentile } => check_percentile(percentile),
            _ => Ok(()),
        }
    }
}

pub(crate) fn check_bits(bits: u8) -> Result<(), QuantError> {
    if matches!(bits, 2..=8 | 16) { Ok(()) } else { Err(QuantError::Bits { bits }) }
}

pub(crate) fn check_granularity(granularity: Granularity) -> Result<(), QuantError> {
    match granularity {
        Granularity::PerGroup { group_size: 0 } => Err(QuantError::GroupSize { group_size: 0 }),
        _ => Ok(()),
    }
}

fn check_percentile(percentile: f32) -> Result<(), QuantError> {
    // Written so that NaN fails.
    if percentile > 50.0 && percentile <= 100.0 { Ok(()) } else { Err(QuantError::Percentile { percentile }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integer_ranges_are_those_of_the_schemes() {
        for (scheme, bits, expect) in [
            (Scheme::Symmetric, 4, (-8, 7)),
            (Scheme::SymmetricStrict, 4, (-7, 7)),
            (Scheme::Asymmetric, 4, (0, 15)),
            (Scheme::Symmetric, 2, (-2, 1)),
            (Scheme::SymmetricStrict, 2, (-1, 1)),
            (Scheme::Asymmetric, 16, (0, 65535)),
            (Scheme::Symmetric, 16, (-32768, 32767)),
        ] {
            assert_eq!(scheme.integer_range(bits), expect, "{scheme} at {bits} bits");
        }
    }

    #[test]
    fn text_forms_round_trip_and_are_the_serde_form() {
        for text in ["per-tensor", "per-channel", "per-group:64"] {
            let value: Granularity = text.parse().unwrap();
            assert_eq!(value.to_string(), text);
            assert_eq!(serde_json::to_value(value).unwrap(), serde_json::json!(text));
        }
        for text in ["min-max", "mse", "percentile:99.9", "enhanced"] {
            let value: RangeEstimator = serde_json::from_value(serde_json::json!(text)).unwrap();
            assert_eq!(value.to_string(), text);
        }
        for text in ["symmetric", "symmetric-strict", "asymmetric"] {
            let value: Scheme = text.parse().unwrap();
            assert_eq!(value.to_string(), text);
            assert_eq!(serde_json::to_value(value).unwrap(), serde_json::json!(text));
        }
    }

    #[test]
    fn impossible_grids_are_refused_by_name() {
        let good = GridSpec {
            bits: 4,
            scheme: Scheme::Symmetric,
            granularity: Granularity::PerChannel,
            range: RangeEstimator::Mse,
        };
        assert_eq!(good.validate(), Ok(()));
        for bits in [0, 1, 9, 15, 17, 255] {
            assert_eq!(GridSpec { bits, ..good }.validate(), Err(QuantError::Bits { bits }));
        }
        let granularity = Granularity::PerGroup { group_size: 0 };
        assert_eq!(GridSpec { granularity, ..good }.validate(), Err(QuantError::GroupSize { group_size: 0 }));
        for percentile in [50.0, 100.1, f32::NAN, -1.0] {
            let range = RangeEstimator::Percentile { percentile };
            assert!(matches!(GridSpec { range, ..good }.validate(), Err(QuantError::Percentile { .. })));
        }
        assert!("per-group:0".parse::<Granularity>().is_err());
        assert!("per-group:x".parse::<Granularity>().is_err());
        assert!("percentile:20".parse::<RangeEstimator>().is_err());
        assert!("Symmetric".parse::<Scheme>().is_err());
    }
}
