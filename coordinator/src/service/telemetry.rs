//! What a coordinator counts of itself, through the `metrics` facade: of no effect where nobody collects.
//!
//! Labels take values of fixed lists: no name of a job, layer or node becomes one. Not here: who collects and shows it.

use crate::dispatch::Attempt;
use halfstep_work::{Census, FailureClass, TaskPhase};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use std::time::Duration;

const STARTS: &str = "halfstep_coordinator_starts_total";
const RECOVERY: &str = "halfstep_recovery_seconds";
const JOBS: &str = "halfstep_jobs";
const JOB_STARTED: &str = "halfstep_job_start_time_seconds";
const LAYERS: &str = "halfstep_job_layers";
const TASKS: &str = "halfstep_tasks";
const ATTEMPTS: &str = "halfstep_task_attempts_total";
const TASK: &str = "halfstep_task_duration_seconds";
const DUPLICATES: &str = "halfstep_task_duplicates_total";
const NODES: &str = "halfstep_nodes";
const SILENCE: &str = "halfstep_node_heartbeat_age_seconds";
const NODES_LOST: &str = "halfstep_nodes_lost_total";
const NODES_FENCED: &str = "halfstep_nodes_fenced_total";
const WRITES_FENCED: &str = "halfstep_fenced_writes_total";
const COMMIT: &str = "halfstep_store_commit_duration_seconds";

/// Values of the label of [`JOBS`].
pub(super) const JOB_STATES: [&str; 5] = ["queued", "running", "finished", "failed", "cancelled"];
/// What the list of nodes says, and the label for it.
pub(super) const NODE_STATES: [(&str, &str); 5] = [
    ("working", "working"),
    ("draining", "draining"),
    ("left out", "left_out"),
    ("hung", "hung"),
    ("lost", "lost"),
];

/// Says what there is, and begins counters at zero, so that the first event is a change.
pub fn describe() {
    describe_counter!(STARTS, "Starts of a coordinator on this state folder, ever");
    describe_gauge!(RECOVERY, Unit::Seconds, "Time the state took to be opened at the last start");
    describe_gauge!(JOBS, "Jobs that are known, by state");
    describe_gauge!(
        JOB_STARTED,
        Unit::Seconds,
        "When the running job was taken up, in seconds since 1970; 0 without one"
    );
    describe_gauge!(LAYERS, "Layers of the running job, decided (solved or given up) or still open");
    describe_gauge!(TASKS, "Tasks of the running job, by where they stand");
    describe_counter!(ATTEMPTS, "Leases of tasks that ended, by how");
    describe_histogram!(TASK, Unit::Seconds, "Time of one slot for a task whose result counts, by phase");
    describe_counter!(DUPLICATES, "Second results of a task; different ones end the job");
    describe_gauge!(NODES, "Registered nodes, by what they do");
    describe_gauge!(
        SILENCE,
        Unit::Seconds,
        "Time since the node that was silent longest was heard of; 0 without nodes"
    );
    describe_counter!(NODES_LOST, "Nodes that were given up, for silence or a broken connection");
    describe_counter!(NODES_FENCED, "Nodes that came back after they had been given up");
    describe_counter!(WRITES_FENCED, "Results refused because their lease held nothing any more");
    describe_histogram!(COMMIT, Unit::Seconds, "Time of one durable transaction of the state");
    let ends = ["ok", "revoked", "not_received"].into_iter();
    for outcome in ends.chain(FailureClass::ALL.map(FailureClass::name)) {
        counter!(ATTEMPTS, "outcome" => outcome).increment(0);
    }
    for verdict in ["identical", "different"] {
        counter!(DUPLICATES, "verdict" => verdict).increment(0);
    }
    for name in [NODES_LOST, NODES_FENCED, WRITES_FENCED] {
        counter!(name).increment(0);
    }
    TaskPhase::ALL.into_iter().for_each(|phase| drop(histogram!(TASK, "phase" => phase.name())));
    drop(histogram!(COMMIT));
}

/// `starts`: with this one.
pub(super) fn started(starts: u64, recovery: Duration) {
    counter!(STARTS).absolute(starts);
    gauge!(RECOVERY).set(recovery);
}

pub(super) fn jobs(state: &'static str, count: usize) {
    gauge!(JOBS, "state" => state).set(count as f64);
}

pub(super) fn job_started(unix_seconds: f64) {
    gauge!(JOB_STARTED).set(unix_seconds);
}

pub(super) fn layers(decided: u64, open: u64) {
    gauge!(LAYERS, "state" => "decided").set(decided as f64);
    gauge!(LAYERS, "state" => "open").set(open as f64);
}

pub(super) fn tasks(census: Census) {
    let Census { waiting, ready, leased, done, failed } = census;
    let all =
        [("waiting", waiting), ("ready", ready), ("leased", leased), ("done", done), ("failed", failed)];
    all.into_iter().for_each(|(state, count)| gauge!(TASKS, "state" => state).set(count as f64));
}

pub(super) fn nodes(state: &'static str, count: usize) {
    gauge!(NODES, "state" => state).set(count as f64);
}

pub(super) fn longest_silence(seconds: f64) {
    gauge!(SILENCE).set(seconds);
}

pub(super) fn node_lost() {
    counter!(NODES_LOST).increment(1);
}

pub(super) fn fenced(nodes: u64, results: u64) {
    counter!(NODES_FENCED).increment(nodes);
    counter!(WRITES_FENCED).increment(results);
}

pub(super) fn committed(took: Duration) {
    histogram!(COMMIT).record(took);
}

pub(super) fn attempt_ended(attempt: &Attempt) {
    if let Some((_, end)) = &attempt.end {
        counter!(ATTEMPTS, "outcome" => end.name()).increment(1);
    }
}

pub(super) fn task_done(phase: TaskPhase, seconds: f64) {
    histogram!(TASK, "phase" => phase.name()).record(seconds);
}

/// A result of a task that has one already.
pub(super) fn duplicate(verdict: &'static str) {
    counter!(DUPLICATES, "verdict" => verdict).increment(1);
}
