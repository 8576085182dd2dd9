//! Quantized language models as folders that other programs load: compressed-tensors, GPTQ, plain weights on the grid;
//! or as one GGUF file.
//!
//! Layers are encoded side by side, as far as memory allows; everything else is copied from the mapped original. Not here: when results appear
//! ([`crate::Staging`]), reading them ([`halfstep_model::checkpoint`]).

mod encode;
mod export;
mod form;
mod gguf;
mod settings;
mod side_by_side;
mod writer;

pub use export::{Exported, Options, SHARD_BYTES, SolvedLayers, export};
pub use form::{Format, LayerForm, check, scale_type};
