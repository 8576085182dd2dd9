//! Times and places of one coordinator.

use halfstep_work::JobId;
use std::path::PathBuf;
use std::time::Duration;

/// How long everything may take. Monotonic clocks only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Nodes say so often that they live.
    pub heartbeat: Duration,
    /// A node that was not heard of for so long is lost.
    pub lease: Duration,
    /// A task whose progress stands still for so long has a hung device.
    pub hung: Duration,
    /// A job without any node for so long fails; it goes on from what is solved when it is submitted again.
    pub no_nodes: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            lease: Duration::from_secs(10),
            hung: Duration::from_secs(120),
            no_nodes: Duration::from_secs(3600),
        }
    }
}

/// What a coordinator is started with, besides listeners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoordinatorOptions {
    /// Folder of its durable state; created if there is none, and for it alone.
    pub state: PathBuf,
    /// Times.
    pub timing: Timing,
    /// The one job that this state is for: whatever else is in it is forgotten. None keeps all.
    pub only: Option<JobId>,
    /// Jobs that are over and kept, the oldest forgotten first; all if none.
    pub keep_jobs: Option<usize>,
}

impl CoordinatorOptions {
    /// With the documented times.
    pub fn new(state: impl Into<PathBuf>) -> Self {
        Self { state: state.into(), timing: Timing::default(), only: None, keep_jobs: None }
    }
}
