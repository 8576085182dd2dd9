//! Work that blocks until something comes over the network, on a thread of its own.
//!
//! The runtime's threads for blocking work are for disks and locks: a simulated clock stands still while one of them is busy, and
//! what it waited for would never come. Rare: once a job, once a node that leaves. Not here: tasks (`workers`).

use std::thread::Builder;
use tokio::sync::oneshot;

/// Runs `work`; an error says why nothing came of it: no thread, or a panic.
pub(super) async fn apart<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (done, result) = oneshot::channel();
    let thread = Builder::new().name(name.to_owned()).spawn(move || {
        // Fails when nobody waits any more.
        let _ = done.send(work());
    });
    thread.map_err(|error| format!("cannot start a thread: {error}"))?;
    result.await.map_err(|_| "its thread panicked".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_comes_of_it_comes_back_and_a_panic_is_no_hang() {
        assert_eq!(apart("seven", || 7).await, Ok(7));
        let panicked = apart("oh", || std::panic::resume_unwind(Box::new("no"))).await;
        assert_eq!(panicked, Err("its thread panicked".to_owned()));
    }
}
