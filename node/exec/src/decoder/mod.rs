//! Decoders: a segment's operators over named tensors, on the CPU or on other devices.
//!
//! A [`DecoderSession`] holds the weights of one segment at a place (`halfstep_compute::decoder::Place`) and runs it with the
//! operators of that place's lanes.
//! Not here: what a decoder is, families, checkpoints (`halfstep_model::decoder`).

mod check;
mod kinds;
mod limits;
mod operators;
mod positions;
mod session;
mod step;

pub use limits::without_kernel;
pub use session::DecoderSession;
