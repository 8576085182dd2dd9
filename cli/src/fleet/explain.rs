//! `explain`: why a job or a task waits, as the coordinator sees it, for people and as JSON.

use std::fmt::Write;

use halfstep_proto::wire::{self, AttemptAccount, ExplainReply, TaskAccount};
use halfstep_proto::{hello, job_to_wire};
use serde_json::json;

use super::args::ExplainArgs;
use super::connect::{Line, job_id};
use super::jobs::{ask, hex, job_json, state};
use crate::commands::show;
use crate::exit::{CliError, Exit};
use crate::render::Table;
use crate::render::progress::clean;

/// Asks and shows.
///
/// # Errors
/// If there is no such job or task, or the job has no tasks now.
pub(crate) fn explain(arguments: &ExplainArgs) -> Result<Exit, CliError> {
    let job = job_to_wire(job_id(&arguments.job)?);
    let task = arguments.task.clone().unwrap_or_default();
    let reply = ask(&arguments.connect, async |line: &Line| {
        let request = wire::ExplainRequest { hello: Some(hello()), job, task };
        let reply = line.jobs.clone().explain(request).await;
        Ok(reply.map_err(|status| line.refused(&status))?.into_inner())
    })?;
    show(arguments.json, &to_json(&reply), |_| to_text(&reply))
}

fn to_json(reply: &ExplainReply) -> serde_json::Value {
    let counts = reply.counts.as_ref().map(|counts| {
        let wire::TaskCounts { waiting, ready, leased, done, failed } = counts;
        json!({ "waiting": waiting, "ready": ready, "leased": leased, "done": done, "failed": failed })
    });
    json!({
        "job": reply.job.as_ref().map(job_json),
        "counts": counts,
        "tasks": reply.tasks.iter().map(task_json).collect::<Vec<_>>(),
        "left_off": reply.left_off,
    })
}

fn task_json(task: &TaskAccount) -> serde_json::Value {
    let attempt = |attempt: &AttemptAccount| {
        json!({
            "lease": attempt.lease,
            "attempt": attempt.attempt,
            "node": attempt.node,
            "name": attempt.node_name,
            "age_ms": attempt.age_ms,
            "took_ms": attempt.took_ms,
            "outcome": if attempt.took_ms.is_some() { Some(&attempt.outcome) } else { None },
            "message": attempt.message,
        })
    };
    json!({
        "task": task.task,
        "label": task.label,
        "state": task.state,
        "why": task.why,
        "attempts": task.attempts.iter().map(attempt).collect::<Vec<_>>(),
    })
}

fn to_text(reply: &ExplainReply) -> String {
    let mut text = String::new();
    if let Some(job) = &reply.job {
        let detail = if job.detail.is_empty() { String::new() } else { format!(": {}", clean(&job.detail)) };
        let _ = writeln!(text, "job {} is {}{detail}", hex(&job.job), state(job));
    }
    if let Some(wire::TaskCounts { waiting, ready, leased, done, failed }) = &reply.counts {
        let _ = writeln!(
            text,
            "tasks: {done} done, {leased} leased, {ready} ready, {waiting} waiting, {failed} failed"
        );
    }
    reply.tasks.iter().for_each(|task| text.push_str(&task_text(task)));
    if reply.left_off > 0 {
        let _ = writeln!(text, "\nand {} more that are leased or failed before", reply.left_off);
    }
    text
}

fn task_text(task: &TaskAccount) -> String {
    let TaskAccount { task: name, label, state, why, .. } = task;
    let mut text = format!("\n{}\n", clean(&format!("{name} ({label}) is {state}: {why}")));
    if task.attempts.is_empty() {
        return text;
    }
    let mut table = Table::new(&["attempt", "<node", "<name", "given out", "took", "<outcome"]);
    for attempt in &task.attempts {
        let outcome = match (attempt.took_ms, attempt.message.as_str()) {
            (None, _) => "under way".to_owned(),
            (Some(_), "") => attempt.outcome.clone(),
            (Some(_), why) => format!("{}: {why}", attempt.outcome),
        };
        table.row([
            attempt.attempt.to_string(),
            format!("node-{}", attempt.node),
            attempt.node_name.clone(),
            format!("{:.1} s ago", attempt.age_ms as f64 / 1e3),
            attempt.took_ms.map_or_else(|| "-".into(), |ms| format!("{:.1} s", ms as f64 / 1e3)),
            outcome,
        ]);
    }
    text.push_str(&table.to_string());
    text
}
