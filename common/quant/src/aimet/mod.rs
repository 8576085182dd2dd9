//! AIMET encodings files, versions 0.6.1, 1.0.0 and 2.0.0: weights to JSON and back.
//!
//! AIMET counts integers from 0 in every scheme; its `offset` is `-zero_point` in that unsigned domain: `-2^(b-1)` for
//! symmetric grids (also strict ones, whose integers are a subset). This module is the only place that converts.
//! Version 2.0.0 mirrors ONNX QuantizeLinear instead and has signed integers with zero point 0, which is left out.
//! Not here: activation encodings (the section is empty), reading or writing files.

mod read;
mod write;

pub use read::{AimetParam, Layout, from_json};
pub use write::{ParamEncoding, to_json};

use crate::QuantError;
use std::fmt;
use std::str::FromStr;

/// Version of an encodings file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// Objects by tensor name, one entry per channel; no blocks.
    V0_6_1,
    /// Lists of entries with arrays of scales and offsets.
    #[default]
    V1_0_0,
    /// One list in the words of QuantizeLinear.
    V2_0_0,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V0_6_1 => "0.6.1",
            Self::V1_0_0 => "1.0.0",
            Self::V2_0_0 => "2.0.0",
        })
    }
}

impl FromStr for Version {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self, QuantError> {
        match text {
            "0.6.1" => Ok(Self::V0_6_1),
            "1.0.0" => Ok(Self::V1_0_0),
            "2.0.0" => Ok(Self::V2_0_0),
            _ => Err(QuantError::Parse {
                what: "encodings version",
                text: text.to_owned(),
                expected: "0.6.1, 1.0.0 or 2.0.0",
            }),
        }
    }
}
