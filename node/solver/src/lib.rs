//! AdaRound: objective, schedule, optimiser, refinement, guard.
//!
//! In: one row chunk of a layer's weight matrix, its encodings, calibration statistics. Out: grid integers and a report.
//! Method: Nagel et al. 2020 (arXiv:2004.10568) on the exact quadratic or on samples, then coordinate descent over
//! {floor, ceil}, then a guard per row; departures from the paper are marked `Deviation:` where they occur.
//! Everything is a function of the arguments and the device kind: no clock, no threads, no I/O.
//!
//! Rows are independent problems, so a layer is solved in row chunks anywhere. Products may differ in the last bit with
//! their number of rows; identical bytes therefore need the same chunks, which the plan fixes.
//!
//! Not here: choosing encodings (`quant`), capturing inputs (`exec`), kernels (`compute`), splitting into chunks (`work`).

mod candidates;
mod check;
#[cfg(test)]
mod device_twins;
mod error;
mod fit;
#[cfg(test)]
mod fixture;
mod footprint;
mod gptq;
mod grid;
mod prepared;
mod problem;
mod quadratic;
mod refine;
mod samples;
pub mod schedule;
mod settings;
mod solve;
mod workspace;

pub use error::{ErrorKind, SolveError};
pub use fit::solve_fitted;
pub use footprint::{Footprint, footprint};
pub use prepared::Prepared;
pub use problem::{Activation, ChunkReport, GramView, RowProblem, SamplesView, Solution, Statistics};
pub use settings::{Settings, Start};
pub use solve::{solve, solve_prepared, solve_watched};
pub use workspace::{Step, Workspace};
