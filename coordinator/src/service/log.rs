//! What watchers of a job are told: everything that still matters, then everything that happens.
//!
//! Watchers never hold up the engine: one that is too slow loses its place and is told so.

use halfstep_proto::JobEvent;
use tokio::sync::broadcast;

/// Events that a watcher may be behind.
const BEHIND_MAX: usize = 1024;

/// The events of one job.
#[derive(Default)]
pub(super) struct JobLog {
    history: Vec<JobEvent>,
    live: Option<broadcast::Sender<JobEvent>>,
}

/// What a watcher begins with, and where it goes on; nothing comes after an event that ends the job.
pub(super) struct Subscription {
    pub(super) history: Vec<JobEvent>,
    pub(super) live: broadcast::Receiver<JobEvent>,
}

impl JobLog {
    pub(super) fn push(&mut self, event: JobEvent) {
        if let Some(live) = &self.live {
            // Fails when nobody watches any more.
            let _ = live.send(event.clone());
        }
        if matters_later(&event) {
            self.history.push(event);
        }
    }

    /// Forgets what was: the job begins again.
    pub(super) fn restart(&mut self) {
        self.history.clear();
    }

    pub(super) fn subscribe(&mut self) -> Subscription {
        let live = self.live.get_or_insert_with(|| broadcast::channel(BEHIND_MAX).0);
        Subscription { history: self.history.clone(), live: live.subscribe() }
    }
}

/// Bounded by the plan; news of tasks and nodes pass.
fn matters_later(event: &JobEvent) -> bool {
    match event {
        JobEvent::Planned { .. }
        | JobEvent::LayerSolved { .. }
        | JobEvent::LayerFailed { .. }
        | JobEvent::LayerKept { .. }
        | JobEvent::Writing
        | JobEvent::Finished { .. } => true,
        JobEvent::Task { .. }
        | JobEvent::NodeJoined { .. }
        | JobEvent::NodeLost { .. }
        | JobEvent::NodeLeftOut { .. }
        | JobEvent::Retry { .. }
        | JobEvent::Waiting { .. }
        | JobEvent::Unknown => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::broadcast::error::TryRecvError;

    fn waiting(n: usize) -> JobEvent {
        JobEvent::Waiting { why: n.to_string() }
    }

    #[test]
    fn a_late_watcher_gets_what_matters_then_what_happens() {
        let mut log = JobLog::default();
        log.push(JobEvent::LayerFailed { name: "a".into(), cause: "NaN".into() });
        log.push(waiting(1));
        let mut watcher = log.subscribe();
        assert_eq!(watcher.history.len(), 1);
        log.push(waiting(2));
        assert_eq!(watcher.live.try_recv().unwrap(), waiting(2));
        assert_eq!(watcher.live.try_recv(), Err(TryRecvError::Empty));
    }

    #[test]
    fn a_slow_watcher_is_told_and_the_others_are_not_held_up() {
        let mut log = JobLog::default();
        let (mut slow, mut quick) = (log.subscribe(), log.subscribe());
        for n in 0..2 * BEHIND_MAX {
            log.push(waiting(n));
            assert_eq!(quick.live.try_recv().unwrap(), waiting(n));
        }
        assert!(matches!(slow.live.try_recv(), Err(TryRecvError::Lagged(_))));
    }
}
