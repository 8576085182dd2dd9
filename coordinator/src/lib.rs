//! Decides what is computed, hands it out, and turns the results into files: planner, scheduler loop, assembly, export.
//!
//! Not here: computing (`agent` and the crates below it; the two sides meet only in `halfstep_work::Node`), the
//! terminal (`cli`).

mod artefacts;
mod assemble;
pub mod checkpoint;
mod config;
pub mod dataset;
pub mod dispatch;
mod error;
mod exchange;
mod export;
pub mod failpoints;
mod inspect;
pub mod jobs;
mod links;
mod manifest;
mod memory;
pub mod partition;
mod plan_source;
mod planner;
mod report;
mod rules;
mod scheduler;
pub mod service;
mod source;
mod staging;
pub mod store;
mod subject;

pub use artefacts::{ArtefactError, ArtefactWriter, Artefacts};
pub use assemble::{Assembled, AssembledLayer, Outcome, Roundings, assemble, integers, summarise};
pub use config::{EncodingsVersion, JobConfig, LanguageConfig, Rule};
pub use error::{CoordinatorError, ErrorKind};
pub use export::{Input, Origin, export};
pub use halfstep_model::decoder::CarryPrecision;
pub use inspect::{Listed, ListedLayer, inspect};
pub use jobs::Finished;
pub use manifest::{FileRecord, Manifest};
pub use plan_source::PlanSource;
pub use planner::{Prepared, prepare, prepare_model};
pub use report::{LayerOutcome, LayerReport, OutcomeKind, Report};
pub use source::{Blob, JobSource, transit_slice};
pub use staging::{Staging, check_target};
pub use subject::{LanguageModel, Subject, model_inputs};
