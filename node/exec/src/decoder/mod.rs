//! Decoders on the CPU: a segment's operators over named tensors.
//!
//! A [`DecoderSession`] holds the weights of one segment and runs it with the kernels of `halfstep_compute::cpu`.
//! Not here: what a decoder is, families, checkpoints (`halfstep_model::decoder`).

mod check;
mod kinds;
mod operators;
mod positions;
mod scratch;
mod session;
mod step;

pub use session::DecoderSession;
