//! Runs segments, taps layer inputs, accumulates statistics, holds carries.
//!
//! Engines load and run sub-models behind one interface ([`Engine`]), decoders run by themselves ([`DecoderSession`]);
//! live tensors wait in a [`CarryStore`]; a layer's input becomes rows ([`Unfolder`]) and rows become exact sums
//! ([`LayerStatistics`]).
//! Not here: what runs when (`work`, `agent`), rounding (`solver`).

mod carry;
mod counting;
mod decoder;
mod engine;
mod error;
mod fixed_gram;
mod layer_means;
mod ort_engine;
mod products;
mod rten_engine;
mod rten_repair;
mod slice;
mod slice_wire;
mod statistics;
mod unfold;

pub use carry::{Carried, CarryKey, CarryStore, CarryUse, Halves, OnDevice, Stream, peak, round_to_bf16};
pub use counting::{CountingEngine, NodeCounts};
pub use decoder::{DecoderSession, without_kernel};
pub use engine::{Engine, Session};
pub use error::ExecError;
pub use fixed_gram::{FixedGram, Part, exponent};
pub use layer_means::LayerMeans;
pub use ort_engine::OrtEngine;
pub use products::Summing;
pub use rten_engine::RtenEngine;
pub use slice::{MeanSlice, SumSlice, UseSlice};
pub use slice_wire::{
    SliceForm, decode_means, decode_samples, decode_sums, encode_means, encode_samples, encode_sums,
};
pub use statistics::{
    Agreement, Exponents, GroupMeans, LayerStatistics, SampleRows, Sampling, ShardProducts, ShardSamples,
    add_samples, means, sampled_positions,
};
pub use unfold::Unfolder;
