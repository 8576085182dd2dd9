//! The pure core of the coordinator: nodes, leases and time in, actions out.
//!
//! Method: every call turns into events of the `JobState`; their consequences feed the scheduler and become actions;
//! then free slots are filled. Time is a monotonic millisecond count that callers pass in. The same calls in the same
//! order give the same actions.
//! Not here: sockets, the store (a rounding must be durable before `complete` is called with it), and any clock.

mod account;
mod alone;
mod changes;
mod clock;
mod grants;
mod handover;
mod history;
mod pace;
mod types;

pub use account::TaskAccount;
pub use history::{Attempt, AttemptEnd};
pub use types::{Action, Counts, JoinReply, Limits, News, Outcome};

use crate::scheduler::Scheduler;
use alone::Alone;
use halfstep_work::{
    Change, Cost, Done, Event, Failure, FailureClass, Group, Inventory, JobState, LayerId, LeaseId,
    NodeDescription, NodeId, Plan, Receipt, SegmentId, TaskId, TaskPhase, Verdict,
};
use handover::Handovers;
use history::History;
use pace::{Paces, Times};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

struct Peer {
    name: String,
    slots: usize,
    /// Slots whose device hangs: given nothing until the process registers anew.
    stuck: usize,
    speed: f64,
    draining: bool,
    last_beat_ms: u64,
}

impl Peer {
    fn can_work(&self) -> bool {
        !self.draining && self.stuck < self.slots
    }
}

/// A lease as time sees it.
#[derive(Clone, Copy)]
struct Running {
    task: TaskId,
    node: NodeId,
    since_ms: u64,
    counter: u64,
    moved_ms: u64,
}

/// What a layer's chunks took so far.
struct Spent {
    /// Seconds of slots.
    seconds: f64,
    /// When the first of them began.
    since_ms: u64,
}

/// See the module.
pub struct Dispatch {
    state: JobState,
    scheduler: Scheduler,
    limits: Limits,
    next_lease: u64,
    peers: BTreeMap<NodeId, Peer>,
    addresses: BTreeMap<NodeId, String>,
    running: BTreeMap<LeaseId, Running>,
    history: History,
    /// Nodes with a free slot.
    free: BTreeSet<NodeId>,
    /// Ready tasks that are not to be tried before a time.
    delayed: BTreeSet<(u64, TaskId)>,
    delayed_until: BTreeMap<TaskId, u64>,
    alone: Alone,
    handovers: Handovers,
    /// Of finished tasks, by stage and phase.
    durations: BTreeMap<(SegmentId, TaskPhase), Times>,
    /// Of finished tasks that are alike.
    alike: BTreeMap<Group, Times>,
    paces: Paces,
    paced_ms: Option<u64>,
    raced_ms: Option<u64>,
    /// Somebody slow was given nothing because others will be sooner.
    held_back: bool,
    /// Of layers of which some chunks are solved.
    spent: BTreeMap<LayerId, Spent>,
    alone_since_ms: Option<u64>,
    held_until_ms: u64,
    said_waiting: bool,
    actions: Vec<Action>,
    /// Whether nodes that found nothing to do should look again.
    look_again: bool,
    fenced: u64,
    speculations: u64,
}

impl Dispatch {
    /// A job, new or resumed: `committed` and `given_up` are what the store has.
    pub fn new(
        plan: Arc<Plan>,
        limits: Limits,
        committed: Vec<Receipt>,
        given_up: BTreeMap<LayerId, Failure>,
    ) -> Self {
        let (state, changes) = JobState::resume(plan, committed, given_up);
        let mut dispatch = Self {
            scheduler: Scheduler::new(&state),
            next_lease: limits.first_lease_id,
            state,
            limits,
            peers: BTreeMap::new(),
            addresses: BTreeMap::new(),
            running: BTreeMap::new(),
            history: History::default(),
            free: BTreeSet::new(),
            delayed: BTreeSet::new(),
            delayed_until: BTreeMap::new(),
            alone: Alone::default(),
            handovers: Handovers::default(),
            durations: BTreeMap::new(),
            alike: BTreeMap::new(),
            paces: Paces::default(),
            paced_ms: None,
            raced_ms: None,
            held_back: false,
            spent: BTreeMap::new(),
            alone_since_ms: None,
            held_until_ms: 0,
            said_waiting: false,
            actions: Vec::new(),
            look_again: false,
            fenced: 0,
            speculations: 0,
        };
        dispatch.follow(changes, 0);
        dispatch
    }

    /// Gives nothing out before this time. After a restart nodes come back one by one: what the later ones hold should
    /// not have been given to the first.
    pub fn hold_until(&mut self, ms: u64) {
        self.held_until_ms = ms;
    }

    /// A node takes part from now on, or says again what it has after its connection was broken.
    ///
    /// `address`: `host:port` of its data plane. `node` is a registration that was never used for another process. A
    /// process that registers anew must be told to `leave` under its old registration first.
    pub fn join(
        &mut self,
        node: NodeId,
        description: &NodeDescription,
        address: &str,
        inventory: Inventory,
        now_ms: u64,
    ) -> JoinReply {
        let slots = description.slots.max(1);
        let speed = description.flops_per_second;
        let before = self.peers.get(&node);
        let (again, stuck) = (before.is_some(), before.map_or(0, |peer| peer.stuck));
        let name = description.name.clone();
        let peer = Peer { name, slots, stuck, speed, draining: false, last_beat_ms: now_ms };
        self.peers.insert(node, peer);
        self.addresses.insert(node, address.to_owned());
        self.alone_since_ms = None;
        self.said_waiting = false;
        if stuck < slots {
            self.scheduler.join(node, speed, slots, &inventory);
        }
        if !again {
            let name = description.name.clone();
            self.actions.push(Action::News(News::NodeJoined { node, name, slots }));
        }
        let in_hand: BTreeSet<LeaseId> = inventory.leases.iter().map(|lease| lease.id).collect();
        let applied = self.state.apply(Event::Joined { node, inventory });
        let changes = applied.map(|applied| applied.changes).unwrap_or_default();
        self.forget_unreceived(node, now_ms);
        let dropped = changes.iter().filter_map(|change| match change {
            Change::DropSums { node: whose, segment } if *whose == node => Some(*segment),
            _ => None,
        });
        let drop_sums = dropped.collect();
        self.follow(changes, now_ms);
        let adopted = self.state.leases_of(node).filter(|lease| in_hand.contains(lease)).collect();
        self.look_again = true;
        self.fill(now_ms, &[node]);
        JoinReply { adopted, drop_sums }
    }

    /// Grants that a node does not know of, whose connection broke meanwhile: nobody works on them.
    fn forget_unreceived(&mut self, node: NodeId, now_ms: u64) {
        let gone = |(lease, running): (&LeaseId, &Running)| {
            (running.node == node && self.state.lease(*lease).is_none()).then_some(*lease)
        };
        let gone: Vec<LeaseId> = self.running.iter().filter_map(gone).collect();
        for lease in gone {
            self.over(lease, AttemptEnd::NotReceived, now_ms);
        }
    }

    /// A lease is out of its node's hands.
    fn over(&mut self, lease: LeaseId, end: AttemptEnd, now_ms: u64) -> Option<Running> {
        let running = self.running.remove(&lease)?;
        self.history.end(running.task, lease, end, now_ms);
        Some(running)
    }

    /// A heartbeat, with a counter per lease that moves while the task does. False if the node does not take part (any
    /// more) and has to attach anew.
    pub fn beat(&mut self, node: NodeId, leases: &[(LeaseId, u64)], now_ms: u64) -> bool {
        let Some(peer) = self.peers.get_mut(&node) else { return false };
        peer.last_beat_ms = now_ms;
        for (lease, counter) in leases {
            if let Some(running) = self.running.get_mut(lease)
                && running.node == node
                && running.counter != *counter
            {
                running.counter = *counter;
                running.moved_ms = now_ms;
            }
        }
        true
    }

    /// A node wants to leave: it gets no more grants. What it holds can be fetched until it leaves; carries that it alone
    /// has are taken over by others.
    pub fn drain(&mut self, node: NodeId, now_ms: u64) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.draining = true;
        if let Ok(applied) = self.state.apply(Event::Draining { node }) {
            self.follow(applied.changes, now_ms);
        }
        self.scheduler.leave(node);
        self.hand_over(node, now_ms);
        self.alone.forget(node);
        self.look_at_paces(now_ms);
        self.look_again = true;
        self.settle(now_ms, &[node]);
    }

    /// A node is gone: lost (`NodeLost`), or drained in good order (`HandedBack`).
    pub fn leave(&mut self, node: NodeId, failure: Failure, now_ms: u64) {
        let Some(peer) = self.peers.remove(&node) else { return };
        self.addresses.remove(&node);
        self.scheduler.leave(node);
        self.scheduler.forget(node);
        self.handovers.forget(node);
        self.alone.forget(node);
        self.paces.forget(node);
        self.free.remove(&node);
        let leases: Vec<LeaseId> = self
            .running
            .iter()
            .filter(|(_, running)| running.node == node)
            .map(|(lease, _)| *lease)
            .collect();
        for lease in leases {
            self.over(lease, AttemptEnd::Failed(failure.clone()), now_ms);
        }
        let why = failure.message.clone();
        self.actions.push(Action::News(News::NodeLost { node, name: peer.name, why }));
        if let Ok(applied) = self.state.apply(Event::Lost { node, failure }) {
            self.follow(applied.changes, now_ms);
        }
        self.look_at_paces(now_ms);
        self.look_again = true;
        self.settle(now_ms, &[]);
    }

    /// Whether a result under this lease could count, so that a zombie's artefact need not be stored. Results of tasks
    /// that are finished are worth keeping for comparison only while the lease is known.
    pub fn would_accept(&self, lease: LeaseId) -> bool {
        self.outcome() == Outcome::Running
            && (self.state.lease(lease).is_some() || self.state.ended_lease(lease).is_some())
    }

    /// A lease was completed. For a rounding: it is durable already, under a name of its own content.
    pub fn complete(
        &mut self,
        node: NodeId,
        lease: LeaseId,
        attempt: u32,
        done: Done,
        cost: Cost,
        now_ms: u64,
    ) -> Verdict {
        let known = self.state.lease(lease).or_else(|| self.state.ended_lease(lease));
        if known.is_some_and(|(_, holder, nth)| (holder, nth) != (node, attempt)) {
            self.fenced += 1;
            return Verdict::Stale;
        }
        let Ok(applied) = self.state.apply(Event::Completed { lease, done }) else { return Verdict::Stale };
        let end = match applied.verdict {
            Verdict::Accepted => AttemptEnd::Done,
            _ => AttemptEnd::Failed(Failure::new(FailureClass::Internal, "the node answered another task")),
        };
        if let Some(running) = self.over(lease, end, now_ms)
            && applied.verdict == Verdict::Accepted
        {
            self.record(&running, &cost, now_ms);
        }
        self.follow(applied.changes, now_ms);
        self.settle(now_ms, &[node]);
        applied.verdict
    }

    /// A lease failed. Of no effect if it is not the node's, or not current any more.
    pub fn fail(&mut self, node: NodeId, lease: LeaseId, failure: Failure, now_ms: u64) {
        if self.state.lease(lease).is_none_or(|(_, holder, _)| holder != node) {
            self.fenced += 1;
            return;
        }
        self.over(lease, AttemptEnd::Failed(failure.clone()), now_ms);
        if let Ok(applied) = self.state.apply(Event::Failed { lease, failure }) {
            self.follow(applied.changes, now_ms);
        }
        self.settle(now_ms, &[node]);
    }

    /// Stops the job.
    pub fn cancel(&mut self, now_ms: u64) {
        self.stop(Failure::new(FailureClass::Cancelled, "cancelled"), now_ms);
    }

    fn stop(&mut self, failure: Failure, now_ms: u64) {
        if let Ok(applied) = self.state.apply(Event::Stopped { failure }) {
            self.follow(applied.changes, now_ms);
        }
    }

    /// What the caller has to do since it asked last.
    pub fn actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Where the job stands.
    pub fn outcome(&self) -> Outcome {
        match self.state.fatal() {
            Some(failure) => Outcome::Failed(failure.clone()),
            None if self.state.is_finished() => Outcome::Finished,
            None => Outcome::Running,
        }
    }

    /// Tasks, layers and roundings.
    pub fn state(&self) -> &JobState {
        &self.state
    }

    /// Whether every slot of a node hangs.
    pub fn is_stuck(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|peer| peer.stuck >= peer.slots)
    }

    /// Whether a node takes part.
    pub fn has_node(&self, node: NodeId) -> bool {
        self.peers.contains_key(&node)
    }

    /// What was counted.
    pub fn counts(&self) -> Counts {
        let counted = self.state.counters();
        Counts {
            fenced: self.fenced + counted.stale,
            duplicates: counted.duplicates,
            retries: counted.retries,
            speculations: self.speculations,
        }
    }
}
