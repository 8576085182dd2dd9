//! Hugging Face checkpoints: a folder with `config.json` and weights in safetensors files.
//!
//! A tensor is read when it is asked for and kept by nobody; what is read is checked before it is used. Not here: what the tensors mean
//! ([`crate::decoder`]), writing checkpoints.

mod file;
mod floats;
mod folder;
mod header;
mod quantized;
mod reader;

pub use folder::is_checkpoint;
pub use header::{HEADER_BYTES_MAX, stored_type, stored_type_name};
pub use quantized::{QUANTIZATION_CONFIG, gptq_pattern};
pub use reader::{Checkpoint, TensorInfo};
