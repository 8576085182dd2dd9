//! Fuzzing of everything that parses bytes from outside: models, checkpoints, data sets, encodings files, plans, and what
//! processes of a fleet send each other.
//!
//! A [`Target`] is a function of arbitrary bytes that must return, whatever they are: no panic, no allocation whose
//! size the bytes chose freely, no endless loop. Each has the shape that libFuzzer wants. The driver (`main`) needs no
//! nightly compiler: it mutates seeds blindly, without coverage feedback, from a seed that reproduces the run.
//! Not here: image files (decoding is the `image` crate's, which is fuzzed by its authors).

mod allocation;
mod checkpoint_target;
mod driver;
mod fleet_target;
mod model_target;
mod mutate;
mod node_target;
mod random;
mod seeds;
mod targets;
mod wire;

pub use allocation::{Limited, SINGLE_ALLOCATION_MAX};
pub use driver::{Failure, Options, Tally, execute, run};
pub use targets::{TARGETS, Target};
