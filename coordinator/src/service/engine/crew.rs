//! Nodes: registrations, their lines, what they are told.
//!
//! A node that cannot take part in the running job is left out of it and waits for the next one.
//! A registration outlives its line for a moment, so that a node whose connection broke goes on as before. A node that
//! was declared lost gets a new registration and is told that it is fenced.

use super::Engine;
use super::job::Active;
use crate::scheduler::Place;
use crate::service::request::{Line, NewNode, Outbound, Pulse, Reply};
use crate::service::telemetry;
use halfstep_proto::wire::coordinator_message::Body;
use halfstep_proto::wire::{self, CoordinatorMessage};
use halfstep_proto::{JobEvent, hello, job_to_wire};
use halfstep_work::{Failure, FailureClass, JobId, NodeDescription, NodeId};
use tonic::Status;

/// Nodes registered at a time.
const SEATS_MAX: usize = 4096;
/// A node that could not open the job is asked again after so long.
const OPEN_AGAIN_MS: u64 = 2_000;

/// How far a node is with the running job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// It has not been asked, or no job runs.
    Not,
    /// It was asked.
    Asked(JobId),
    /// It works on it.
    Open(JobId),
    /// It could not, and is asked again at that time.
    Again(JobId, u64),
    /// It takes no part in it.
    LeftOut(JobId),
}

/// One registered node.
pub(super) struct Seat {
    pub(super) description: NodeDescription,
    pub(super) address: String,
    line: Option<(u64, Outbound)>,
    pub(super) opening: Opening,
    /// Why it is left out, if it is.
    why: String,
    pub(super) draining: bool,
    pub(super) pulse: Pulse,
    pub(super) tasks_done: u64,
    heard_ms: u64,
    gone_ms: Option<u64>,
}

impl Seat {
    /// What decides the bits it computes.
    pub(super) fn kind(&self) -> (String, String) {
        (self.description.device.clone(), self.description.engine.clone())
    }

    pub(super) fn is_connected(&self) -> bool {
        self.line.is_some()
    }

    /// It is attached and has not said yet what it has of the job.
    pub(super) fn is_opening(&self, job: JobId) -> bool {
        self.is_connected()
            && match self.opening {
                Opening::Asked(asked) | Opening::Again(asked, _) => asked == job,
                Opening::Not | Opening::Open(_) | Opening::LeftOut(_) => false,
            }
    }

    /// By what it can add up statistics in a group, and its line, if it works on the job and will go on.
    pub(super) fn in_group(&self, job: JobId) -> Option<(&str, u64)> {
        let way = self.description.exchange.as_str();
        let (line, _) = self.line.as_ref()?;
        (self.opening == Opening::Open(job) && !self.draining && !way.is_empty()).then_some((way, *line))
    }

    /// Whether it works on a job or may yet.
    pub(super) fn may_take_part(&self, wanted: JobId) -> bool {
        let (Opening::Asked(job) | Opening::Open(job) | Opening::Again(job, _)) = self.opening else {
            return false;
        };
        job == wanted && !self.draining
    }
}

impl Engine {
    pub(super) fn attach(&mut self, new: NewNode, outbound: Outbound, reply: Reply<Line>) {
        let known = new.previous.filter(|(node, epoch)| {
            *epoch == self.store.epoch() && self.seats.get(node).is_some_and(|seat| !seat.draining)
        });
        if known.is_none() && self.seats.len() >= SEATS_MAX {
            // Nobody waits for the answer if the node went away meanwhile.
            let _ =
                reply.send(Err(Status::resource_exhausted(format!("there are {SEATS_MAX} nodes already"))));
            return;
        }
        let fenced = known.is_none() && new.previous.is_some_and(|(_, epoch)| epoch == self.store.epoch());
        if fenced {
            self.count_fenced(self.active.as_ref().map(|active| active.id), |fenced| fenced.nodes += 1);
        }
        let node = known.map_or(NodeId(self.next_node), |(node, _)| node);
        if known.is_none() {
            self.next_node += 1;
        }
        let line = Line { node, number: self.next_line };
        self.next_line += 1;
        if reply.send(Ok(line)).is_err() {
            return;
        }
        let seat = Seat {
            description: new.description,
            address: new.address,
            line: Some((line.number, outbound)),
            opening: Opening::Not,
            why: String::new(),
            draining: false,
            pulse: Pulse::default(),
            tasks_done: self.seats.get(&node).map_or(0, |seat| seat.tasks_done),
            heard_ms: self.now_ms(),
            gone_ms: None,
        };
        tracing::info!(%node, name = seat.description.name, address = seat.address, fenced, "node attached");
        self.seats.insert(node, seat);
        self.welcome(node, fenced);
        self.ask_to_open(node);
    }

    fn welcome(&mut self, node: NodeId, fenced: bool) {
        let welcome = wire::Welcome {
            hello: Some(hello()),
            node: node.0,
            epoch: self.store.epoch(),
            heartbeat_ms: self.timing.heartbeat.as_millis() as u64,
            lease_ms: self.timing.lease.as_millis() as u64,
            fenced,
        };
        self.say(node, Body::Welcome(welcome));
    }

    /// Tells a node about the running job, unless its kind computes other bits.
    pub(super) fn ask_to_open(&mut self, node: NodeId) {
        let Some(open) = self.active.as_ref().and_then(Active::open_message) else { return };
        let Some(job) = self.active.as_ref().map(|active| active.id) else { return };
        if let Some(why) = self.misfit(job, node) {
            return self.leave_out(node, job, why);
        }
        if let Some(seat) = self.seats.get_mut(&node).filter(|seat| !seat.draining) {
            seat.opening = Opening::Asked(job);
            self.say(node, Body::Open(open));
        }
    }

    /// Why a node cannot take part: another device kind or engine than the job's first node has.
    pub(super) fn misfit(&self, job: JobId, node: NodeId) -> Option<String> {
        let (device, engine) = self.jobs.get(&job)?.record.computed_by.as_ref()?;
        let theirs = &self.seats.get(&node)?.description;
        if (&theirs.device, &theirs.engine) == (device, engine) {
            return None;
        }
        Some(format!(
            "node `{}`: computes with {} and {}, but job {job} was begun with {device} and {engine}; results are \
             bit-identical within one kind only",
            theirs.name, theirs.device, theirs.engine
        ))
    }

    /// The job goes on without a node, which stays for the next one.
    pub(super) fn leave_out(&mut self, node: NodeId, job: JobId, why: String) {
        let now = self.now_ms();
        tracing::warn!(%node, %job, why, "node left out");
        let Some(seat) = self.seats.get_mut(&node) else { return };
        (seat.opening, seat.why) = (Opening::LeftOut(job), why.clone());
        let name = seat.description.name.clone();
        self.say(node, Body::Refused(wire::Refused { reason: why.clone(), job: job_to_wire(job) }));
        if let Some(dispatch) = self.active.as_mut().and_then(Active::dispatch_mut) {
            // Of no effect unless it took part before its connection broke.
            dispatch.leave(node, Failure::new(FailureClass::HandedBack, "left out"), now);
        }
        self.log(JobEvent::NodeLeftOut { name, why });
    }

    /// Who takes no part in a job, and why: the end of a sentence, empty if nobody is left out.
    pub(super) fn left_out(&self, job: JobId) -> String {
        let left = self.seats.values().filter(|seat| seat.opening == Opening::LeftOut(job));
        let mut whys: Vec<&str> = left.map(|seat| seat.why.as_str()).collect();
        whys.sort_unstable();
        whys.dedup();
        match (whys.first(), whys.len()) {
            (None, _) => String::new(),
            (Some(first), 1) => format!("; left out: {first}"),
            (Some(first), more) => format!("; left out: {first}; and {} more, see `nodes`", more - 1),
        }
    }

    /// Ends a registration; its line ends when what was said on it is delivered.
    pub(super) fn dismiss(&mut self, node: NodeId, failure: Failure) {
        let now = self.now_ms();
        self.links.forget(node);
        if self.seats.remove(&node).is_some()
            && let Some(dispatch) = self.active.as_mut().and_then(Active::dispatch_mut)
        {
            dispatch.leave(node, failure, now);
        }
    }

    pub(super) fn retry_opening(&mut self, now_ms: u64) {
        let due = |seat: &Seat| matches!(seat.opening, Opening::Again(_, at) if at <= now_ms);
        let nodes: Vec<NodeId> =
            self.seats.iter().filter(|(_, seat)| due(seat)).map(|(node, _)| *node).collect();
        nodes.into_iter().for_each(|node| self.ask_to_open(node));
    }

    pub(super) fn open_again_later(&mut self, node: NodeId, job: JobId) {
        let at = self.now_ms() + OPEN_AGAIN_MS;
        if let Some(seat) = self.seats.get_mut(&node) {
            seat.opening = Opening::Again(job, at);
        }
    }

    /// Sends a message. A node that does not read is cut off: it will come back, or be lost.
    pub(super) fn say(&mut self, node: NodeId, body: Body) {
        let now = self.now_ms();
        let Some(seat) = self.seats.get_mut(&node) else { return };
        let Some((_, outbound)) = &seat.line else { return };
        if !outbound.say(CoordinatorMessage { body: Some(body) }) {
            tracing::warn!(%node, "the line of a node is full or closed");
            seat.line = None;
            seat.gone_ms = Some(now);
        }
    }

    /// Whether a message came over the line that its node has now.
    fn is_current(&self, line: Line) -> bool {
        let seat = self.seats.get(&line.node);
        seat.and_then(|seat| seat.line.as_ref()).is_some_and(|(number, _)| *number == line.number)
    }

    pub(super) fn heard(&mut self, line: Line) -> bool {
        let now = self.now_ms();
        let current = self.is_current(line);
        if let Some(seat) = self.seats.get_mut(&line.node).filter(|_| current) {
            seat.heard_ms = now;
        }
        current
    }

    pub(super) fn pulse(&mut self, line: Line, pulse: Pulse) {
        if !self.heard(line) {
            return;
        }
        let now = self.now_ms();
        if let Some(dispatch) = self.active.as_mut().and_then(Active::dispatch_mut) {
            // A node that has not opened the job yet takes no part.
            let _ = dispatch.beat(line.node, &pulse.leases, now);
        }
        if let Some(seat) = self.seats.get_mut(&line.node) {
            seat.pulse = pulse;
        }
    }

    pub(super) fn drain(&mut self, line: Line, reason: &str) {
        if !self.heard(line) {
            return;
        }
        tracing::info!(node = %line.node, reason, "node drains");
        let now = self.now_ms();
        if let Some(seat) = self.seats.get_mut(&line.node) {
            seat.draining = true;
        }
        if let Some(dispatch) = self.active.as_mut().and_then(Active::dispatch_mut) {
            dispatch.drain(line.node, now);
        }
        self.let_go(line.node);
    }

    /// Somebody wants a node to leave: it gets no more grants, and is told to hand back what it has. `which`: its number,
    /// with or without `node-`, or a name that it alone has.
    pub(super) fn ask_to_leave(&mut self, which: &str) -> Result<wire::DrainReply, Status> {
        let node = self.find_seat(which)?;
        let now = self.now_ms();
        let leases = self.leases_of(node);
        let Some(seat) = self.seats.get_mut(&node).filter(|seat| seat.is_connected()) else {
            return Err(Status::unavailable(format!(
                "{node}: its connection broke, it cannot be told anything"
            )));
        };
        seat.draining = true;
        let name = seat.description.name.clone();
        tracing::info!(%node, name, "node is asked to leave");
        let reason = "somebody drained this node".to_owned();
        self.say(node, Body::Drain(wire::Drain { reason }));
        if let Some(dispatch) = self.active.as_mut().and_then(Active::dispatch_mut) {
            dispatch.drain(node, now);
        }
        Ok(wire::DrainReply { node: node.0, name, leases })
    }

    /// What became of a carry that a leaving node had: when it is over with the last one, that node may go.
    pub(super) fn taken_over(&mut self, line: Line, job: JobId, carry: Place, taken: bool) {
        let running = self.active.as_mut().filter(|active| active.id == job);
        if let Some(dispatch) = running.and_then(Active::dispatch_mut) {
            dispatch.taken_over(line.node, carry, taken);
        }
        self.heard(line);
    }

    fn find_seat(&self, which: &str) -> Result<NodeId, Status> {
        let shown: String = which.chars().filter(|c| !c.is_control()).take(100).collect();
        let named = self.seats.iter().filter(|(_, seat)| seat.description.name == which);
        let named: Vec<NodeId> = named.map(|(node, _)| *node).collect();
        let number = which.strip_prefix("node-").unwrap_or(which).parse().ok().map(NodeId);
        match (number.filter(|node| self.seats.contains_key(node)), named.as_slice()) {
            (Some(node), _) => Ok(node),
            (None, [node]) => Ok(*node),
            (None, []) => {
                Err(Status::not_found(format!("node `{shown}`: there is none of that number or name")))
            }
            (None, several) => {
                let numbers: Vec<String> = several.iter().map(NodeId::to_string).collect();
                let numbers = numbers.join(", ");
                Err(Status::invalid_argument(format!(
                    "node `{shown}`: several have that name, say which: {numbers}"
                )))
            }
        }
    }

    fn leases_of(&self, node: NodeId) -> u64 {
        let dispatch = self.active.as_ref().and_then(Active::dispatch);
        dispatch.map_or(0, |dispatch| dispatch.state().leases_of(node).count() as u64)
    }

    /// What a node is doing, in the words of the list of nodes.
    pub(super) fn condition(&self, node: NodeId, seat: &Seat) -> &'static str {
        let dispatch = self.active.as_ref().and_then(Active::dispatch);
        match (seat.is_connected(), seat.draining) {
            (false, _) => "lost",
            (true, true) => "draining",
            (true, false) if matches!(seat.opening, Opening::LeftOut(_)) => "left out",
            (true, false) if dispatch.is_some_and(|dispatch| dispatch.is_stuck(node)) => "hung",
            (true, false) => "working",
        }
    }

    /// Milliseconds since the node that was silent longest was heard of.
    pub(super) fn longest_silence_ms(&self) -> u64 {
        let now = self.now_ms();
        self.seats.values().map(|seat| now.saturating_sub(seat.heard_ms)).max().unwrap_or(0)
    }

    /// A draining node without leases may leave, once others have what it alone had.
    pub(super) fn let_go(&mut self, node: NodeId) {
        let now = self.now_ms();
        let busy = self.active.as_ref().and_then(Active::dispatch).is_some_and(|dispatch| {
            dispatch.state().leases_of(node).next().is_some() || dispatch.is_handing_over(node, now)
        });
        if busy || !self.seats.get(&node).is_some_and(|seat| seat.draining) {
            return;
        }
        self.say(node, Body::Farewell(wire::Farewell { reason: "drained".into() }));
        self.dismiss(node, Failure::new(FailureClass::HandedBack, "drained"));
    }

    pub(super) fn detached(&mut self, line: Line) {
        if !self.is_current(line) {
            return;
        }
        let now = self.now_ms();
        if let Some(seat) = self.seats.get_mut(&line.node) {
            seat.line = None;
            seat.gone_ms = Some(now);
        }
    }

    /// Nodes whose connection is gone for most of a heartbeat, or that are silent for a lease, are lost.
    pub(super) fn expire_lines(&mut self, now_ms: u64) {
        let grace = self.timing.heartbeat.as_millis() as u64 * 3 / 4;
        let lease = self.timing.lease.as_millis() as u64;
        let lost: Vec<(NodeId, String)> = self
            .seats
            .iter()
            .filter_map(|(node, seat)| {
                if seat.gone_ms.is_some_and(|gone| now_ms.saturating_sub(gone) >= grace) {
                    return Some((*node, "its connection broke and it did not come back".into()));
                }
                let silent = now_ms.saturating_sub(seat.heard_ms);
                (silent >= lease).then(|| (*node, format!("no heartbeat for {:.1} s", silent as f64 / 1e3)))
            })
            .collect();
        for (node, why) in lost {
            telemetry::node_lost();
            tracing::warn!(%node, why, "node lost");
            self.dismiss(node, Failure::new(FailureClass::NodeLost, why));
        }
    }

    pub(super) fn close_job(&mut self, job: JobId) {
        let nodes: Vec<NodeId> = self.seats.keys().copied().collect();
        for node in nodes {
            if let Some(seat) = self.seats.get_mut(&node) {
                seat.opening = Opening::Not;
            }
            self.say(node, Body::Close(wire::CloseJob { job: job_to_wire(job) }));
            self.let_go(node);
        }
    }

    /// The last words to everybody.
    pub(super) fn farewell(&mut self) {
        let nodes: Vec<NodeId> = self.seats.keys().copied().collect();
        for node in nodes {
            self.say(node, Body::Farewell(wire::Farewell { reason: "the coordinator stops".into() }));
        }
        self.seats.clear();
    }

    pub(super) fn nodes(&self) -> wire::NodesReply {
        let status = |(node, seat): (&NodeId, &Seat)| wire::NodeStatus {
            node: node.0,
            description: Some((&seat.description).into()),
            address: seat.address.clone(),
            state: self.condition(*node, seat).into(),
            leases: self.leases_of(*node),
            held_bytes: seat.pulse.held_bytes,
            bytes_sent: seat.pulse.bytes_sent,
            bytes_fetched: seat.pulse.bytes_fetched,
            tasks_done: seat.tasks_done,
            detail: match seat.opening {
                Opening::LeftOut(_) => seat.why.clone(),
                _ => String::new(),
            },
            line: self.line_of(*node),
        };
        wire::NodesReply {
            nodes: self.seats.iter().map(status).collect(),
            fenced_nodes: self.fenced.nodes,
            fenced_results: self.fenced.results,
        }
    }
}
