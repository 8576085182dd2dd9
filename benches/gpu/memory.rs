//! GPUs' memory in use while something runs, from `nvidia-smi`.
//!
//! `nvidia-smi` counts a card's memory, whoever uses it, and knows nothing of `CUDA_VISIBLE_DEVICES`: where that is set the numbers
//! may be another card's. Not here: what a device's own accounts say (`compute`).

use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Time between two looks.
const EVERY: Duration = Duration::from_millis(500);

/// Does the work and says besides how much memory was in use at most on any one of these GPUs, in bytes.
///
/// None without GPUs, without `nvidia-smi`, or if the work was over before the first look.
pub(crate) fn watched<T>(ordinals: &[usize], work: impl FnOnce() -> T) -> (T, Option<u64>) {
    if ordinals.is_empty() {
        return (work(), None);
    }
    let ids = ordinals.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    std::thread::scope(|scope| {
        let (over, until) = channel();
        let watcher = scope.spawn(move || watch(&ids, &until));
        let done = work();
        drop(over);
        (done, watcher.join().unwrap_or(None))
    })
}

fn watch(ids: &str, until: &Receiver<()>) -> Option<u64> {
    let mut most = None;
    while until.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
        match in_use(ids) {
            Some(used) => most = most.max(Some(used)),
            None => return most,
        }
    }
    most
}

fn in_use(ids: &str) -> Option<u64> {
    let mut command = Command::new("nvidia-smi");
    command.args(["--query-gpu=memory.used", "--format=csv,noheader,nounits"]).arg(format!("--id={ids}"));
    let output = command.output().ok().filter(|output| output.status.success())?;
    largest(&String::from_utf8_lossy(&output.stdout))
}

/// The largest of lines in MiB, in bytes.
fn largest(text: &str) -> Option<u64> {
    text.lines().map(|line| line.trim().parse::<u64>().ok()).max().flatten().map(|mib| mib << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fullest_gpu_counts_and_no_gpu_none() {
        for (text, expect) in
            [("512\n 46182\n", Some(46182 << 20)), ("", None), ("[N/A]\n", None), ("No devices\n", None)]
        {
            assert_eq!(largest(text), expect, "{text}");
        }
        assert_eq!(watched(&[], || 7), (7, None));
    }
}
