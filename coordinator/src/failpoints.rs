//! Named points of the durable path that a test can make fail, wait, or kill the process.
//!
//! Without the feature `failpoints` they compile to nothing. With it, the variable `FAILPOINTS` (crate `fail`) sets
//! actions: `artefact.rename=return` is an error there, `return(full)` a full disk, `2*off->1*return(abort)` ends the
//! process at the third visit without any clean-up, as `kill -9` would.
//! Not here: failpoints of nodes (`agent`).

use std::io;

/// Every point, in the order in which a job meets them; a harness walks this table.
pub const FAILPOINTS: &[&str] = &[
    "store.open.epoch",
    "store.commit.before",
    "store.commit.after",
    "artefact.create",
    "artefact.write",
    "artefact.fsync",
    "artefact.rename",
    "artefact.folder",
    "input.link",
    "engine.commit.before",
    "engine.commit.after",
    "engine.answer",
    "export.create",
    "export.write",
    "export.rename",
    "export.folder",
    "job.finish",
    "job.forget",
];

/// Reads `FAILPOINTS`; does nothing in a binary without the feature. Called once, before any thread is started.
pub fn setup() {
    #[cfg(feature = "failpoints")]
    std::mem::forget(fail::FailScenario::setup());
}

/// One visit of a point.
///
/// # Errors
/// What the point was told to fail with.
pub(crate) fn visit(name: &'static str) -> io::Result<()> {
    debug_assert!(FAILPOINTS.contains(&name), "failpoint {name} is not in the table");
    fail::fail_point!(name, |action| outcome(name, action.as_deref()));
    Ok(())
}

#[cfg(feature = "failpoints")]
fn outcome(name: &str, action: Option<&str>) -> io::Result<()> {
    match action {
        Some("abort") => std::process::abort(),
        Some("full") => {
            Err(io::Error::new(io::ErrorKind::StorageFull, format!("failpoint {name}: no space left")))
        }
        _ => Err(io::Error::other(format!("failpoint {name}"))),
    }
}
