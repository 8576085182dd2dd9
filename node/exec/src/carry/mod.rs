//! Carries: the live tensors at a segment boundary, for both streams.

mod file;
mod packed;
mod store;

pub use packed::{Carried, Halves, OnDevice, peak, round_to_bf16};
pub use store::{CarryKey, CarryStore, CarryUse, Stream};
