//! Worker threads: one per slot, each doing one lease after the other.
//!
//! Not here: where leases come from (`attach`) and where outcomes go (`report`).

use super::leases::{InHand, Leases};
use super::options::DaemonError;
use super::telemetry;
use crate::{LocalNode, failpoints, failure};
use halfstep_work::{Cost, Done, Failure, Node, TaskPhase, Watch};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

/// What came of a lease.
pub(super) type Outcome = Result<(Done, Cost), Failure>;

/// Threads that live until the leases are stopped.
pub(super) struct Workers {
    leases: Arc<Leases>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// As many as the node has slots. `report` must not block.
    pub(super) fn start(
        node: &Arc<LocalNode>,
        leases: &Arc<Leases>,
        report: impl Fn(Arc<InHand>, Outcome) + Clone + Send + 'static,
    ) -> Result<Self, DaemonError> {
        let mut workers = Self { leases: Arc::clone(leases), threads: Vec::new() };
        for slot in 0..node.describe().slots {
            let (node, leases, report) = (Arc::clone(node), Arc::clone(leases), report.clone());
            let work = move || {
                while let Some(lease) = leases.next() {
                    let outcome = lease.span.in_scope(|| execute(&node, &lease));
                    leases.rest(&lease);
                    report(lease, outcome);
                }
            };
            let thread = std::thread::Builder::new().name(format!("slot-{slot}")).spawn(work);
            workers.threads.push(thread.map_err(DaemonError::Thread)?);
        }
        Ok(workers)
    }

    /// Whether every thread has ended.
    pub(super) fn ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }
}

/// Whatever ends the daemon ends its workers, after the task in hand.
impl Drop for Workers {
    fn drop(&mut self) {
        self.leases.stop();
    }
}

/// A panic below is a bug, but it must not take the slot with it.
fn execute(node: &LocalNode, lease: &InHand) -> Outcome {
    let attempt = AssertUnwindSafe(|| {
        let _at_work = failpoints::at_work();
        failpoints::attempt("node.execute", &lease.grant.lease.task)?;
        node.execute(&lease.grant, lease)
    });
    let outcome = catch_unwind(attempt).unwrap_or_else(|_| {
        Err(failure::internal(format!("{:?}: the node panicked", lease.grant.lease.task)))
    });
    tell(lease, &outcome);
    outcome
}

/// One line for a chunk that is solved, and for whatever fails; the rest for who looks closely.
fn tell(lease: &InHand, outcome: &Outcome) {
    let phase = lease.grant.lease.task.phase();
    telemetry::worked(phase, outcome);
    match outcome {
        Ok((_, Cost { seconds, .. })) if phase == TaskPhase::Solve => tracing::info!(seconds, "chunk solved"),
        Ok((_, Cost { seconds, .. })) => tracing::debug!(seconds, "task done"),
        // Nobody wants it any more: no failure of this node.
        Err(_) if lease.cancelled() => tracing::debug!("task stopped"),
        Err(failure) => {
            tracing::warn!(class = failure.class.name(), failure = failure.message, "task failed");
        }
    }
}
