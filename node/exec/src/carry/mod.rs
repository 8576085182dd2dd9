//! Carries: the live tensors at a segment boundary, for both streams.

mod file;
mod store;

pub use store::{CarryKey, CarryStore, CarryUse, Stream};
