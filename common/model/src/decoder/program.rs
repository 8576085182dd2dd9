//! What a node is told of a language model's job: the decoder, and how its numbers are kept.
//!
//! Bytes: a magic, then JSON. Not here: plans (`work`), weights (`checkpoint`).

use super::{Decoder, DecoderError};
use bytes::Bytes;
use halfstep_quant::ScaleType;
use serde::{Deserialize, Serialize};

/// An ONNX model cannot begin like this.
const MAGIC: &[u8; 8] = b"HSDECODE";

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderProgram {
    /// What is run.
    pub decoder: Decoder,
    /// Values of what passes from segment to segment.
    pub carries: CarryPrecision,
    /// What linear layers' inputs and weights may be rounded to where a device multiplies them.
    #[serde(default)]
    pub factors: CarryPrecision,
    /// Values that scales may have: what the output stores.
    pub scales: ScaleType,
}

/// Values of the tensors between segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CarryPrecision {
    /// As computed.
    #[default]
    F32,
    /// Rounded to the nearest bfloat16: half the memory and traffic.
    Bf16,
}

impl DecoderProgram {
    /// Whether a program blob is one of these.
    pub fn is_one(blob: &[u8]) -> bool {
        blob.starts_with(MAGIC)
    }

    /// As it travels.
    ///
    /// # Errors
    /// If a number is not finite.
    pub fn to_bytes(&self) -> Result<Bytes, DecoderError> {
        let mut bytes = MAGIC.to_vec();
        serde_json::to_writer(&mut bytes, self).map_err(|e| whole(e.to_string()))?;
        Ok(bytes.into())
    }

    /// Reads and validates one.
    ///
    /// # Errors
    /// Anything else than what `to_bytes` writes of a valid decoder.
    pub fn from_bytes(blob: &[u8]) -> Result<Self, DecoderError> {
        let json = blob.strip_prefix(MAGIC).ok_or_else(|| whole("is not a decoder program".into()))?;
        let program: Self = serde_json::from_slice(json).map_err(|e| whole(e.to_string()))?;
        program.decoder.validate()?;
        Ok(program)
    }
}

fn whole(problem: String) -> DecoderError {
    DecoderError { node: "program".into(), problem }
}
