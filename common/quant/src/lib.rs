//! Grids, encodings, range estimators, integer packing and metrics; pure.
//!
//! A layer is seen as a weight matrix `[rows, cols]`, row-major, one row per output channel. A [`GridSpec`] says what
//! grid is wanted, [`estimate`] chooses scales and zero points from the weights, and the resulting [`Encodings`] map
//! between real numbers and integers: `real = (q - zero_point) * scale`.
//!
//! Not here: which of the two neighbouring integers a weight takes (`halfstep-solver`), how a tensor becomes a matrix
//! (`halfstep-model`), files. This crate does no I/O and reads no clock.

pub mod aimet;
pub mod blocks;
mod encodings;
mod enhanced;
mod error;
mod grid;
pub mod layouts;
pub mod metrics;
mod mse_grids;
mod mse_search;
pub mod packing;
mod range;
mod scale_type;

pub use encodings::Encodings;
pub use error::{ErrorKind, QuantError};
pub use grid::{Granularity, GridSpec, RangeEstimator, Scheme};
pub use mse_grids::MseGrids;
pub use mse_search::nearest_level;
pub use range::{SCALE_MIN, estimate};
pub use scale_type::ScaleType;
