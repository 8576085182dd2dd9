//! Named points of a node's work at which a test can kill or hang the process, or let a task fail.
//!
//! Without the feature `failpoints` they compile to nothing. With it, the variable `FAILPOINTS` (crate `fail`) sets
//! actions: `node.commit=2*off->1*return(abort)` ends the process at the third visit without any clean-up, as `kill -9`
//! would; `node.execute=return(abort:solve-9)` whenever layer 9 is to be solved; `return(hang)` stops the thread for good;
//! `node.execute=return(memory:solve-9)` lets a task fail as one does for which the memory does not suffice,
//! `return(crowded:capture)` one that is the third or later at work at the same time.
//! Not here: failpoints of the coordinator.

use halfstep_work::{Failure, Task};

/// Every point, in the order in which a lease meets them; a harness walks this table.
pub const FAILPOINTS: &[&str] =
    &["node.execute", "node.upload", "node.commit", "node.answered", "node.settle"];

/// Reads `FAILPOINTS`; does nothing in a binary without the feature. Called once per process, before any thread is
/// started, and not if the coordinator's was.
pub fn setup() {
    #[cfg(feature = "failpoints")]
    std::mem::forget(fail::FailScenario::setup());
}

/// Tasks at work, as long as they live.
#[cfg(feature = "failpoints")]
static AT_WORK: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// One task at work, for points that count them.
pub(crate) struct AtWork;

/// A task begins.
pub(crate) fn at_work() -> AtWork {
    #[cfg(feature = "failpoints")]
    AT_WORK.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    AtWork
}

#[cfg(feature = "failpoints")]
impl Drop for AtWork {
    fn drop(&mut self) {
        AT_WORK.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
    }
}

/// One visit of a point with a task in hand.
pub(crate) fn visit(name: &'static str, task: &Task) {
    // A task that is done cannot fail any more.
    let _ = attempt(name, task);
}

/// One visit of a point at which a task can still fail.
///
/// # Errors
/// What a test asked for; never in a binary without the feature.
pub(crate) fn attempt(name: &'static str, task: &Task) -> Result<(), Failure> {
    debug_assert!(FAILPOINTS.contains(&name), "failpoint {name} is not in the table");
    fail::fail_point!(name, |action| act(action.as_deref(), task));
    let _ = task;
    Ok(())
}

#[cfg(feature = "failpoints")]
fn act(action: Option<&str>, task: &Task) -> Result<(), Failure> {
    let (word, wanted) = action.map_or(("", None), |action| match action.split_once(':') {
        Some((word, label)) => (word, Some(label)),
        None => (action, None),
    });
    if wanted.is_some_and(|wanted| wanted != label(task)) {
        return Ok(());
    }
    match word {
        "abort" => std::process::abort(),
        "hang" => loop {
            std::thread::park();
        },
        "memory" => short_of_memory(),
        "crowded" if AT_WORK.load(std::sync::atomic::Ordering::SeqCst) > 2 => short_of_memory(),
        _ => Ok(()),
    }
}

#[cfg(feature = "failpoints")]
fn short_of_memory() -> Result<(), Failure> {
    let why = "expected 1 byte more than there is, by order of a test";
    Err(Failure::new(halfstep_work::FailureClass::OutOfMemory, why))
}

/// `solve-9`: phase and layer; the phase alone if there is no layer.
#[cfg(feature = "failpoints")]
fn label(task: &Task) -> String {
    let phase = format!("{:?}", task.phase()).to_lowercase();
    task.layer().map_or(phase.clone(), |layer| format!("{phase}-{}", layer.0))
}
