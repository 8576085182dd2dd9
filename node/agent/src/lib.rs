//! The node: executes leased tasks against its carries and statistics.
//!
//! In: a plan, a source of artefacts, leases. Out: peaks, roundings, classified failures. Method: each task is a pure
//! function of the plan, the source and the carries; carries and statistics are rebuilt from those if lost.
//! Not here: which task comes next (`work`, `coordinator`), mathematics (`solver`), engines (`exec`).

mod attempt;
mod blocks;
mod carry_wire;
mod collective;
mod daemon;
mod device_memory;
mod devices;
mod exchange;
pub mod failpoints;
mod failure;
mod forward;
mod forward_decoder;
mod job;
mod layer_problem;
mod lazy;
mod local;
mod means;
mod phase_clock;
mod probe;
mod program;
mod rates;
mod replay;
mod room;
mod serve;
mod sessions;
mod sums;
mod transit;
mod weights;

pub use carry_wire::{Live, Place as CarryPlace, decode as decode_carry, encode as encode_carry};
pub use daemon::{DaemonError, DaemonEvent, DaemonOptions, Drain, NodeDaemon, describe_metrics};
pub use device_memory::{StageMemory, device_memory};
pub use devices::{DeviceChoice, Devices};
pub use exchange::Exchange;
pub use forward::{Forward, ForwardError};
pub use forward_decoder::{DecoderForward, Predictions, Scores};
pub use halfstep_compute::cuda;
pub use halfstep_compute::{LargePages, give_back_large_blocks};
pub use halfstep_exec::{CarryUse, CountingEngine, Engine, ExecError, NodeCounts, OrtEngine, RtenEngine};
pub use halfstep_model::checkpoint::is_checkpoint;
pub use local::{LocalNode, NodeOptions};
pub use probe::{ProbeReport, SegmentProbe, TapProbe, probe};
pub use rates::Rates;
