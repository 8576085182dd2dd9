//! Decides what is computed, hands it out, and turns the results into files: planner, scheduler loop, assembly, export.
//!
//! Not here: computing (`agent` and the crates below it; the two sides meet only in `halfstep_work::Node`), the
//! terminal (`cli`).

mod assemble;
mod config;
pub mod dataset;
mod error;
mod export;
mod inspect;
mod manifest;
mod planner;
mod report;
mod rules;
mod run;
mod source;
mod staging;

pub use assemble::{Assembled, AssembledLayer, assemble};
pub use config::{EncodingsVersion, JobConfig, Rule};
pub use error::{CoordinatorError, ErrorKind};
pub use export::export;
pub use inspect::{Listed, ListedLayer, inspect};
pub use manifest::{FileRecord, Manifest};
pub use planner::{Prepared, model_inputs, prepare, prepare_model};
pub use report::{LayerOutcome, LayerReport, OutcomeKind, Report};
pub use run::{RunEvent, run};
pub use source::{JobSource, transit_slice};
pub use staging::check_target;
