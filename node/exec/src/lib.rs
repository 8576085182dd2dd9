//! Runs segments, taps layer inputs, accumulates statistics, holds carries.
//!
//! [`Program`] runs one segment on one shard ([`Program::capture`]) and adds the tapped inputs to the statistics
//! ([`Program::accumulate`]); live tensors wait in a [`CarryStore`]. Engines are behind [`Engine`].
//! Not here: what is done with statistics (`solver`), leases and order of work (`agent`).

mod carry;
mod counting;
mod engine;
mod error;
pub mod fixed_gram;
mod ort_engine;
mod program;
mod rten_engine;
mod samples;
mod statistics;
pub mod unfold;

pub use carry::{CarryKey, CarryStats, CarryStore, Stream};
pub use counting::CountingEngine;
pub use engine::{Engine, Session};
pub use error::{ErrorKind, ExecError};
pub use fixed_gram::FixedGram;
pub use ort_engine::OrtEngine;
pub use program::{Program, TapPeak, Weights, split_batches};
pub use rten_engine::RtenEngine;
pub use samples::{GroupSamples, LayerSamples, SampleStore};
pub use statistics::{
    Bound, GroupMoments, LayerMoments, LayerStatistics, StatisticsSettings, StatisticsStore, TapBatch,
};
