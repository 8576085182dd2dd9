//! What a node counts of itself, through the `metrics` facade: of no effect where nobody collects.
//!
//! Labels take values of fixed lists. Not here: who collects and shows it.

use super::run::Shared;
use super::workers::Outcome;
use halfstep_work::{FailureClass, TaskPhase};
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

const ATTACHED: &str = "halfstep_node_attached";
const LEASES: &str = "halfstep_node_leases";
const TASKS: &str = "halfstep_node_tasks_total";
const TASK: &str = "halfstep_node_task_duration_seconds";
const CACHE: &str = "halfstep_activation_cache_bytes";
const SPILLED: &str = "halfstep_activation_spilled_bytes";
const GPU: &str = "halfstep_gpu_memory_used_bytes";

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// Says what there is, and begins counters at zero, so that the first event is a change.
pub fn describe() {
    describe_gauge!(ATTACHED, "1 while the node is attached to a coordinator, 0 while it waits for one");
    describe_gauge!(LEASES, "Leases in the node's hands: waiting for a slot, worked on or being reported");
    describe_counter!(TASKS, "Tasks that the node has worked on, by what came of it here");
    describe_histogram!(TASK, Unit::Seconds, "Time of one slot for a task that gave a result, by phase");
    describe_gauge!(CACHE, Unit::Bytes, "Activations held in memory for the open job");
    describe_gauge!(SPILLED, Unit::Bytes, "Activations written to files so far for the open job");
    describe_gauge!(GPU, Unit::Bytes, "Memory of a CUDA device in use by all processes; absent without one");
    for outcome in std::iter::once("ok").chain(FailureClass::ALL.map(FailureClass::name)) {
        counter!(TASKS, "outcome" => outcome).increment(0);
    }
    TaskPhase::ALL.into_iter().for_each(|phase| drop(histogram!(TASK, "phase" => phase.name())));
    [ATTACHED, LEASES, CACHE, SPILLED].into_iter().for_each(|name| gauge!(name).set(0.0));
}

/// One task is over.
pub(super) fn worked(phase: TaskPhase, outcome: &Outcome) {
    match outcome {
        Ok((_, cost)) => {
            counter!(TASKS, "outcome" => "ok").increment(1);
            histogram!(TASK, "phase" => phase.name()).record(cost.seconds);
        }
        Err(failure) => counter!(TASKS, "outcome" => failure.class.name()).increment(1),
    }
}

/// Sets gauges for as long as the daemon lives: what can be looked at without waiting.
pub(super) async fn look(shared: Arc<Shared>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        gauge!(ATTACHED).set(f64::from(u8::from(shared.session.borrow().is_some())));
        gauge!(LEASES).set(shared.leases.all().len() as f64);
    }
}

/// The same for what may take its time: activations that somebody moves, a device that hangs.
pub(super) async fn look_patiently(shared: Arc<Shared>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let node = Arc::clone(&shared.node);
        let looked = tokio::task::spawn_blocking(move || (node.carry_use(), node.devices().memory_used()));
        let Ok((activations, devices)) = looked.await else { return };
        gauge!(CACHE).set(activations.resident as f64);
        gauge!(SPILLED).set(activations.spilled as f64);
        for (ordinal, bytes) in devices {
            gauge!(GPU, "device" => ordinal.to_string()).set(bytes as f64);
        }
    }
}
