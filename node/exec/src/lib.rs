//! Runs segments, taps layer inputs, accumulates statistics, holds carries.
//!
//! Engines load and run sub-models behind one interface ([`Engine`]); live tensors wait in a [`CarryStore`]; a layer's
//! input becomes rows ([`Unfolder`]) and rows become exact sums ([`LayerStatistics`]).
//! Not here: what runs when (`work`, `agent`), rounding (`solver`).

mod carry;
mod counting;
mod engine;
mod error;
mod fixed_gram;
mod ort_engine;
mod rten_engine;
mod rten_repair;
mod statistics;
mod unfold;

pub use carry::{CarryKey, CarryStore, CarryUse, Stream};
pub use counting::{CountingEngine, NodeCounts};
pub use engine::{Engine, Session};
pub use error::ExecError;
pub use fixed_gram::{FixedGram, Part, exponent};
pub use ort_engine::OrtEngine;
pub use rten_engine::RtenEngine;
pub use statistics::{
    Agreement, GroupMeans, LayerStatistics, SampleRows, Sampling, means, peak, sampled_positions,
};
pub use unfold::Unfolder;
