//! `pod`: one pod of a Kubernetes Job, whose pods all run the same command and differ by their index.
//!
//! ```text
//!   index 0     coordinator, client of its own (over memory) and node; ends with 0 when the results are in place
//!   others      nodes; never end with 0, because an index that has is never started again
//! ```
//! A pod that is stopped ends with 75, so that another takes its place. Exit codes 2, 4, 65 and 78 say that trying again
//! would not help. Not here: the manifests (`k8s/`), what coordinators and nodes do (the files beside this folder).

mod args;
mod lead;
mod peers;
mod placed;
mod work;

pub(crate) use args::PodArgs;

use crate::exit::{CliError, Exit};

/// Takes the part that the index says.
///
/// # Errors
/// As the modules of the two parts say.
pub(crate) fn pod(arguments: PodArgs) -> Result<Exit, CliError> {
    match &arguments.coordinator {
        None if arguments.index == 0 => lead::lead(arguments),
        None => {
            let coordinator = format!("{}:{}", arguments.peers.of(0), arguments.listen.port());
            work::work(arguments, coordinator)
        }
        Some(coordinator) => {
            let coordinator = coordinator.clone();
            work::work(arguments, coordinator)
        }
    }
}
