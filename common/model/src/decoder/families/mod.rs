//! Reads a `config.json` and describes the decoder that it configures.
//!
//! Each family is one row of facts ([`known`]) that one builder ([`block`]) turns into operators. Names of tensors are
//! those of published checkpoints. A field that would change what is computed and is not understood is refused; fields
//! of training (dropout, initial ranges) and of generation are not read. Absent fields have the values that the
//! `transformers` classes give them.
//! Not here: the operators ([`super::Decoder`]), reading tensors (`checkpoint`).

mod bind;
mod block;
mod error;
mod fields;
mod known;
mod rotary;

pub use error::FamilyError;

use super::Decoder;
use fields::Fields;
use serde_json::Value;

/// What the configuration leaves open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DescribeOptions {
    /// Gives every token to every expert while statistics are taken; the routing's weights stay as they are.
    pub calibrate_all_experts: bool,
}

/// The decoder that a `config.json` describes, weights by their names in the published checkpoint; see
/// [`Decoder::bind`] for checkpoints that name them a little differently.
///
/// # Errors
/// `Family` for an architecture that is not known; `Quantized` if its weights are integers already; `Field` for the
/// first field that is missing, absurd, or asks for something that is not computed here; `Decoder` if the sizes do not
/// fit each other.
pub fn describe(config: &Value, options: DescribeOptions) -> Result<Decoder, FamilyError> {
    let fields = Fields::new(config)?;
    refuse_quantized(&fields)?;
    let family = known::family(&fields)?;
    let decoder = block::build(&family, options);
    decoder.validate()?;
    Ok(decoder)
}

fn refuse_quantized(fields: &Fields<'_>) -> Result<(), FamilyError> {
    for field in ["quantization_config", "compression_config"] {
        if let Some(quantization) = fields.object(field)? {
            let method = quantization.text("quant_method")?.unwrap_or(field);
            return Err(FamilyError::Quantized { method: method.to_owned() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
