//! A process that runs for a part of the time only, as one would on a machine that is shared or failing.
//!
//! SIGSTOP and SIGCONT in turn, by an account of the time that it has run: a slice that came out long is followed by
//! shorter ones. Its connections stay open, and its sleeps stand still too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// Between two beginnings of a slice.
const PERIOD: Duration = Duration::from_millis(100);

/// Runs freely again when dropped.
#[derive(Debug)]
pub struct Throttle {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// Lets a process group run for this percentage of the time: 0 freezes it, 100 or more leaves it alone. `lag`: where
    /// its period begins, so that several need not run at the same moments.
    pub fn new(group: u32, percent: u32, lag: Duration) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let thread = Pid::from_raw(group.cast_signed()).filter(|_| percent < 100).map(|group| {
            let done = Arc::clone(&done);
            thread::spawn(move || slices(group, f64::from(percent) / 100.0, lag, &done))
        });
        Self { done, thread }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It signals and sleeps: there is nothing in it that fails.
            let _ = thread.join();
        }
    }
}

fn slices(group: Pid, share: f64, lag: Duration, done: &AtomicBool) {
    let signal = |signal| {
        // Fails when the process is gone: then there is nothing to slow down.
        let _ = kill_process_group(group, signal);
    };
    thread::sleep(lag);
    let (begun, mut ran) = (Instant::now(), Duration::ZERO);
    while !done.load(Ordering::Relaxed) {
        let period = Instant::now();
        let due = (begun.elapsed() + PERIOD).mul_f64(share).saturating_sub(ran).min(PERIOD);
        if !due.is_zero() {
            signal(Signal::CONT);
            let slice = Instant::now();
            thread::sleep(due);
            signal(Signal::STOP);
            ran += slice.elapsed();
        } else {
            signal(Signal::STOP);
        }
        thread::sleep(PERIOD.saturating_sub(period.elapsed()));
    }
    signal(Signal::CONT);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::cpu_seconds;
    use crate::logs::Logs;
    use crate::process::Process;
    use std::process::Command;

    #[test]
    fn a_process_gets_its_part_of_the_time_and_all_of_it_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let mut busy = Command::new("sh");
        busy.args(["-c", "while :; do :; done"]);
        let busy = Process::start("busy", &mut busy, folder.path(), &Logs::default()).unwrap();
        let spent = |percent| {
            let throttle = Throttle::new(busy.pid(), percent, Duration::ZERO);
            let (before, begun) = (cpu_seconds(busy.pid()).unwrap(), Instant::now());
            thread::sleep(Duration::from_secs(1));
            let used = cpu_seconds(busy.pid()).unwrap() - before;
            drop(throttle);
            used / begun.elapsed().as_secs_f64()
        };
        let (frozen, part) = (spent(0), spent(20));
        // A busy machine gives less, never more.
        assert!(frozen < 0.05 && part > 0.0 && part < 0.35, "{frozen}, {part}");
        assert!(spent(100) > 0.0);
    }
}
