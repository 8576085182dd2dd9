//! Answers to "why": a job, its notable tasks, or one of them.
//!
//! Not here: what there is to say (`dispatch::account`).

use super::Engine;
use super::job::Active;
use crate::dispatch::{Attempt, Dispatch, TaskAccount};
use halfstep_proto::wire;
use halfstep_work::JobId;
use tonic::Status;

/// Tasks of one answer, and attempts of each: what a person reads, and fits into a message.
const TASKS_SHOWN: usize = 20;
const ATTEMPTS_SHOWN: usize = 25;

impl Engine {
    /// `task`: its name, or empty for all that is notable. Only the running job has tasks.
    pub(super) fn explain(&self, job: JobId, task: &str) -> Result<wire::ExplainReply, Status> {
        let status = self.status(job)?;
        let active = self.active.as_ref().filter(|active| active.id == job);
        let Some(dispatch) = active.and_then(Active::dispatch) else {
            if task.is_empty() {
                return Ok(wire::ExplainReply { job: Some(status), ..Default::default() });
            }
            return Err(Status::failed_precondition(format!(
                "job {job}: nodes do not work on it, tasks are known of the running job alone ({})",
                if status.detail.is_empty() { "it is finished" } else { &status.detail }
            )));
        };
        let (tasks, left_off) = match task {
            "" => {
                let all = dispatch.notable();
                let shown = all.len().min(TASKS_SHOWN);
                (all[..shown].to_vec(), all.len() - shown)
            }
            name => (vec![dispatch.find_task(name).map_err(Status::invalid_argument)?], 0),
        };
        let now = self.now_ms();
        let accounts = tasks.into_iter().map(|task| task_to_wire(dispatch.account(task, now), now));
        Ok(wire::ExplainReply {
            job: Some(status),
            counts: Some(counts(dispatch)),
            tasks: accounts.collect(),
            left_off: left_off as u64,
        })
    }
}

fn counts(dispatch: &Dispatch) -> wire::TaskCounts {
    let census = dispatch.state().census();
    wire::TaskCounts {
        waiting: census.waiting as u64,
        ready: census.ready as u64,
        leased: census.leased as u64,
        done: census.done as u64,
        failed: census.failed as u64,
    }
}

fn task_to_wire(account: TaskAccount, now_ms: u64) -> wire::TaskAccount {
    let TaskAccount { name, label, state, why, attempts } = account;
    let latest = &attempts[attempts.len().saturating_sub(ATTEMPTS_SHOWN)..];
    let attempts = latest.iter().map(|attempt| attempt_to_wire(attempt, now_ms)).collect();
    wire::TaskAccount { task: name, label, state: state.into(), why, attempts }
}

fn attempt_to_wire(attempt: &Attempt, now_ms: u64) -> wire::AttemptAccount {
    let end = attempt.end.as_ref();
    wire::AttemptAccount {
        lease: attempt.lease.0,
        attempt: attempt.number,
        node: attempt.node.0,
        node_name: attempt.name.clone(),
        age_ms: now_ms.saturating_sub(attempt.since_ms),
        took_ms: end.map(|(at, _)| at.saturating_sub(attempt.since_ms)),
        outcome: end.map(|(_, end)| end.name().to_owned()).unwrap_or_default(),
        message: end.map(|(_, end)| end.message().to_owned()).unwrap_or_default(),
    }
}
