//! What a person or a program sees: progress to stderr, data to stdout.
//!
//! Not here: what is shown (`backend`), exit codes (`exit`).

pub(crate) mod progress;
mod table;
mod text;

pub(crate) use table::Table;
pub(crate) use text::{eval, inspect, outcome, perplexity, plan, verified};
