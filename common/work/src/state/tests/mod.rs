//! The state machine alone: numbers of tasks, refused events, journals replayed. Its rules as a fleet sees them are
//! tested with the dispatch (`coordinator/tests`).

mod plans;

use super::*;
use crate::{ChunkId, Done, Held, Inventory, RangeId, Task};
use plans::{done, plan, rounding};
use proptest::prelude::*;

fn join(state: &mut JobState, node: u32) {
    state.apply(Event::Joined { node: NodeId(node), inventory: Inventory::default() }).unwrap();
}

fn ready(state: &JobState) -> Vec<TaskId> {
    let all = (0..state.table().len()).map(TaskId);
    all.filter(|task| {
        *state.task_state(*task) == TaskState::Ready && state.is_open(state.table().split(*task).0)
    })
    .collect()
}

fn grant(state: &mut JobState, id: u64, node: u32) -> Lease {
    let task = *ready(state).first().expect("something to do");
    let lease = state.propose(LeaseId(id), NodeId(node), task);
    state.apply(Event::Granted { lease: lease.clone() }).unwrap();
    lease
}

#[test]
fn every_task_has_one_number_and_every_number_one_task() {
    for ranges in [1, 2, 3] {
        let plan = plan(5, ranges, 3);
        let table = TaskTable::new(&plan);
        // Forward runs, captures and accumulations by shard; slices and chunks by layer.
        assert_eq!(table.len(), (ranges - 1) * 3 + 2 * 5 * 3 + 5 * (2 + 3));
        for id in (0..table.len()).map(TaskId) {
            let (group, place) = table.split(id);
            assert_eq!(table.id(group, place), id);
            assert_eq!(table.find(&table.task(id, &Arc::default())), Some(id));
        }
    }
}

#[test]
fn tasks_that_the_plan_does_not_have_have_no_number() {
    let table = TaskTable::new(&plan(2, 2, 3));
    let (segment, shard) = (SegmentId(0), ShardId(0));
    let peaks = Arc::default();
    for task in [
        Task::Forward { range: RangeId(1), shard },
        Task::Forward { range: RangeId(0), shard: ShardId(3) },
        Task::Capture { segment: SegmentId(2), shard },
        Task::Capture { segment, shard: ShardId(u32::MAX) },
        Task::Accumulate { segment, shard: ShardId(3), peaks },
        Task::Reduce { layer: LayerId(2), slice: SliceId(0) },
        Task::Reduce { layer: LayerId(1), slice: SliceId(2) },
        Task::Solve { layer: LayerId(u32::MAX), chunk: ChunkId(0) },
        Task::Solve { layer: LayerId(1), chunk: ChunkId(3) },
    ] {
        assert_eq!(table.find(&task), None, "{task:?}");
    }
}

#[test]
fn identity_of_a_task_does_not_depend_on_its_peaks() {
    let table = TaskTable::new(&plan(1, 1, 2));
    let (segment, shard) = (SegmentId(0), ShardId(1));
    let with =
        |peaks: Vec<PeakRecord>| table.find(&Task::Accumulate { segment, shard, peaks: Arc::new(peaks) });
    assert_eq!(with(vec![]), with(plans::peaks(segment, shard)));
}

#[test]
fn events_that_contradict_the_state_are_refused_and_change_nothing() {
    let (mut state, _) = JobState::new(plan(1, 1, 2));
    join(&mut state, 0);
    let lease = grant(&mut state, 1, 0);
    let accumulate = state.table().id(Group::Accumulate(SegmentId(0)), 0);
    let other = |id: u64, node: u32, task: TaskId| state.propose(LeaseId(id), NodeId(node), task);
    let free = ready(&state)[0];
    let refused = [
        (other(2, 7, free), "node-7: not a node of this job, or not any more"),
        (other(1, 0, free), "lease-1: its task cannot be given out to node-0 now"),
        (other(2, 0, accumulate), "lease-2: its task cannot be given out to node-0 now"),
        (Lease { id: LeaseId(2), ..lease.clone() }, "lease-2: its task cannot be given out to node-0 now"),
    ];
    let before = state.clone();
    for (lease, text) in refused {
        assert_eq!(state.apply(Event::Granted { lease }).unwrap_err().to_string(), text);
    }
    let failure = Failure::new(crate::FailureClass::Hung, "x");
    let stale = state.apply(Event::Failed { lease: LeaseId(9), failure: failure.clone() });
    assert_eq!(stale.unwrap_err(), EventRefused::Stale { lease: LeaseId(9) });
    assert!(state.apply(Event::Lost { node: NodeId(3), failure }).is_err());
    assert_eq!(state, before);
}

#[test]
fn an_inventory_with_impossible_claims_is_survived() {
    let (mut state, _) = JobState::new(plan(2, 2, 2));
    let far = u32::MAX;
    let held = vec![
        Held::Sums { segment: SegmentId(far), shards: vec![ShardId(0)] },
        Held::Sums { segment: SegmentId(0), shards: vec![ShardId(far)] },
        Held::Sums { segment: SegmentId(1), shards: vec![ShardId(1), ShardId(0)] },
        Held::Means { layer: LayerId(far), slice: SliceId(0) },
        Held::Means { layer: LayerId(0), slice: SliceId(far) },
        Held::Carry { range: RangeId(far), segment: SegmentId(0), shard: ShardId(0) },
        Held::Carry { range: RangeId(1), segment: SegmentId(0), shard: ShardId(far) },
    ];
    let captured = vec![(SegmentId(far), ShardId(0), vec![]), (SegmentId(0), ShardId(far), vec![])];
    let task = Task::Capture { segment: SegmentId(far), shard: ShardId(0) };
    let leases = vec![Lease { id: LeaseId(1), node: NodeId(0), attempt: 1, task }];
    let inventory = Inventory { held, captured, leases };
    let applied = state.apply(Event::Joined { node: NodeId(0), inventory }).unwrap();
    let dropped = applied.changes.iter().filter(|change| matches!(change, Change::DropSums { .. })).count();
    assert_eq!(dropped, 3);
    assert!(applied.changes.iter().any(|change| matches!(change, Change::Revoked { lease: LeaseId(1), .. })));
    assert_eq!(state.leases().count(), 0);
}

#[test]
fn roundings_that_are_not_in_the_plan_are_ignored_on_resuming() {
    let receipt = |layer, chunk| Receipt::of(&rounding(layer, chunk));
    let committed = vec![receipt(9, 0), receipt(0, 9), receipt(0, 0), receipt(0, 0)];
    let (state, _) = JobState::resume(plan(1, 1, 1), committed, [].into());
    assert_eq!(state.progress(Group::Solve(LayerId(0))).done, 1);
    let (state, _) =
        JobState::resume(plan(1, 1, 1), (0..3).map(|chunk| receipt(0, chunk)).collect(), [].into());
    assert!(state.is_finished() && state.receipts(LayerId(0)).is_some());
}

#[test]
fn a_plan_whose_ids_are_no_indices_is_refused() {
    let mut twice = Plan::clone(&plan(2, 1, 2));
    twice.layers[1].id = LayerId(0);
    assert!(twice.validate().unwrap_err().to_string().starts_with("layer `layer1`: id must be its index 1"));
    let mut unknown = Plan::clone(&plan(2, 1, 2));
    unknown.stages[0].solve.push(LayerId(7));
    assert!(unknown.validate().unwrap_err().to_string().starts_with("stage 0: solves layer 7"));
}

#[test]
fn statistics_can_only_be_those_of_an_earlier_layer_of_the_same_stage_and_form() {
    let mut base = Plan::clone(&plan(2, 1, 2));
    base.stages[0].solve.push(LayerId(1));
    base.stages[1].solve.clear();
    base.layers[1].stage = SegmentId(0);
    let with = |change: &dyn Fn(&mut Plan)| {
        let mut plan = base.clone();
        (plan.layers[1].statistics_of, plan.layers[1].slices) = (Some(LayerId(0)), Vec::new());
        change(&mut plan);
        plan.validate().map_err(|error| error.to_string())
    };
    assert_eq!(with(&|_| {}), Ok(()));
    let text = "layer `layer1`: has the statistics of layer";
    let later = |plan: &mut Plan| {
        (plan.layers[0].statistics_of, plan.layers[1].statistics_of) = (Some(LayerId(1)), None);
    };
    assert!(with(&later).unwrap_err().starts_with("layer `layer0`: has the statistics of layer 1"));
    assert!(with(&|plan| plan.layers[1].statistics_of = Some(LayerId(1))).unwrap_err().starts_with(text));
    assert!(with(&|plan| plan.layers[1].statistics_of = Some(LayerId(9))).unwrap_err().starts_with(text));
    assert!(with(&|plan| plan.layers[1].cols = 3).unwrap_err().starts_with(text));
    assert!(with(&|plan| plan.layers[1].groups = 2).unwrap_err().starts_with(text));
    let sliced = with(&|plan| plan.layers[1].slices = vec![0..1, 1..2]).unwrap_err();
    assert!(sliced.starts_with("slices of layer `layer1`"), "{sliced}");
}

#[derive(Clone, Debug)]
enum Step {
    Join(u32),
    Grant { node: u32, nth: usize },
    Finish { nth: usize },
    Fail { nth: usize, class: usize },
    Lose(u32),
    Drain(u32),
    Late { nth: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0u32..4).prop_map(Step::Join),
        8 => (0u32..4, 0usize..9).prop_map(|(node, nth)| Step::Grant { node, nth }),
        8 => (0usize..5).prop_map(|nth| Step::Finish { nth }),
        1 => (0usize..5, 0usize..12).prop_map(|(nth, class)| Step::Fail { nth, class }),
        1 => (0u32..4).prop_map(Step::Lose),
        1 => (0u32..4).prop_map(Step::Drain),
        1 => (0usize..20).prop_map(|nth| Step::Late { nth }),
    ]
}

/// The event that a step stands for in this state; also such as will be refused.
fn event(state: &JobState, step: &Step, next: &mut u64, given: &mut Vec<Lease>) -> Option<Event> {
    let current = |nth: usize| {
        let all: Vec<LeaseId> = state.leases().collect();
        (!all.is_empty()).then(|| all[nth % all.len()])
    };
    let answer = |lease: LeaseId| given.iter().find(|known| known.id == lease).map(|lease| done(&lease.task));
    Some(match step {
        Step::Join(node) => Event::Joined { node: NodeId(*node), inventory: Inventory::default() },
        Step::Lose(node) => {
            Event::Lost { node: NodeId(*node), failure: Failure::new(crate::FailureClass::NodeLost, "gone") }
        }
        Step::Drain(node) => Event::Draining { node: NodeId(*node) },
        Step::Grant { node, nth } => {
            let all = ready(state);
            let task = *all.get(nth % all.len().max(1))?;
            *next += 1;
            let lease = state.propose(LeaseId(*next), NodeId(*node), task);
            given.push(lease.clone());
            Event::Granted { lease }
        }
        Step::Finish { nth } => {
            let lease = current(*nth)?;
            Event::Completed { lease, done: answer(lease)? }
        }
        Step::Fail { nth, class } => {
            let failure = Failure::new(crate::FailureClass::ALL[*class], "on purpose");
            Event::Failed { lease: current(*nth)?, failure }
        }
        Step::Late { nth } => {
            let lease = given.get(nth % given.len().max(1))?;
            Event::Completed { lease: lease.id, done: Done::clone(&done(&lease.task)) }
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn events_replayed_give_the_same_state_and_the_same_answers(
        ranges in 1usize..4,
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let plan = plan(3, ranges, 3);
        let (mut live, _) = JobState::new(Arc::clone(&plan));
        let (mut journal, mut given, mut next) = (Vec::new(), Vec::new(), 0);
        for step in &steps {
            if let Some(event) = event(&live, step, &mut next, &mut given) {
                let answer = live.apply(event.clone());
                journal.push((event, answer));
            }
        }
        let (mut replayed, _) = JobState::new(plan);
        for (event, answer) in journal {
            prop_assert_eq!(replayed.apply(event), answer);
        }
        prop_assert_eq!(replayed, live);
    }
}
