//! This node's place in a group: one thread that joins, adds up and leaves, as the coordinator orders.
//!
//! ```text
//!   order heard --(expected rounds are noted at once)--> queue --> thread: name, join, add up, leave --> answer
//!        |                                                            ^
//!        +-- another epoch, leave, or the stream is lost: the flag of the epoch is raised, whatever it is at is given up
//! ```
//! Orders of an epoch whose flag is up are only tidied away. Nothing here is needed by anybody: what is not added up is
//! fetched.
//! Not here: who is in a group (`coordinator`), the additions (`exchange`).

use crate::LocalNode;
use crate::exchange::Exchange;
use crate::job::Job;
use halfstep_compute::cuda::{Communicator, Patience, Place, UniqueId};
use halfstep_proto::wire::node_message::Body;
use halfstep_proto::wire::{self, NodeMessage};
use halfstep_work::{GroupAnswer, GroupOrder, JobId, Round};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// Time for all to join.
const JOIN: Duration = Duration::from_secs(30);
/// Time for one addition: a few megabytes, once all are at it.
const ADD: Duration = Duration::from_secs(20);
/// How long a task waits for the next slice of a round that was announced: longer than an addition that fails takes.
const ROUND: Duration = Duration::from_secs(30);
/// Time to leave in good order: nothing is under way, but others may be gone.
const LEAVE: Duration = Duration::from_secs(1);

/// An order on its way to the thread.
struct Heard {
    epoch: u64,
    ended: Arc<AtomicBool>,
    order: Order,
    /// None if nobody is there to hear it.
    answer: Option<mpsc::Sender<NodeMessage>>,
}

enum Order {
    Name,
    Join {
        id: Vec<u8>,
        place: Place,
    },
    /// With the job whose sums they are; none if it is not open here.
    Round(Round, Option<Arc<Job>>),
    Leave,
}

/// The way to the thread, which ends with it.
pub(super) struct GroupLine {
    orders: Sender<Heard>,
    /// The latest epoch and the flag that ends it.
    current: Mutex<Option<(u64, Arc<AtomicBool>)>>,
}

impl GroupLine {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there is none to be had.
    pub(super) fn start(node: &Arc<LocalNode>, exchange: Exchange) -> std::io::Result<Self> {
        let (orders, heard) = channel();
        let node = Arc::clone(node);
        let work = move || GroupThread { node, exchange, member: None }.work(&heard);
        std::thread::Builder::new().name("group".into()).spawn(work)?;
        Ok(Self { orders, current: Mutex::default() })
    }

    /// Takes an order. `open`: which job is open here; asked for after its sums are at hand, so that they are that job's.
    pub(super) fn hear(
        &self,
        (epoch, order): (u64, GroupOrder),
        node: &LocalNode,
        open: impl FnOnce() -> Option<JobId>,
        answer: &mpsc::Sender<NodeMessage>,
    ) {
        let ended = self.flag(epoch);
        let order = match order {
            GroupOrder::Name => Order::Name,
            GroupOrder::Join { id, rank, size } => {
                Order::Join { id: id.to_vec(), place: Place { rank: rank as usize, size: size as usize } }
            }
            GroupOrder::Round(round) => {
                let job = node.open_job().filter(|_| open() == Some(round.job));
                if let Some(job) = job.as_ref().filter(|_| !ended.load(Ordering::Acquire)) {
                    job.together.expect(round.layer, (epoch, round.number), ROUND);
                }
                Order::Round(round, job)
            }
            GroupOrder::Leave => {
                ended.store(true, Ordering::Release);
                Order::Leave
            }
        };
        // The thread lives as long as this line.
        let _ = self.orders.send(Heard { epoch, ended, order, answer: Some(answer.clone()) });
    }

    /// The stream is lost, and with it whoever might end the group.
    pub(super) fn detached(&self) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((epoch, ended)) = current {
            ended.store(true, Ordering::Release);
            let _ = self.orders.send(Heard { epoch, ended, order: Order::Leave, answer: None });
        }
    }

    /// The flag of an epoch; a new epoch raises that of the one before.
    fn flag(&self, epoch: u64) -> Arc<AtomicBool> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match &*current {
            Some((latest, flag)) if *latest == epoch => Arc::clone(flag),
            before => {
                if let Some((_, flag)) = before {
                    flag.store(true, Ordering::Release);
                }
                let flag = Arc::<AtomicBool>::default();
                *current = Some((epoch, Arc::clone(&flag)));
                flag
            }
        }
    }
}

/// In a group.
struct Membership {
    epoch: u64,
    group: Communicator,
    /// The number of the round to come.
    next: u64,
}

struct GroupThread {
    node: Arc<LocalNode>,
    exchange: Exchange,
    member: Option<Membership>,
}

impl GroupThread {
    fn work(mut self, heard: &Receiver<Heard>) {
        while let Ok(heard) = heard.recv() {
            // A panic below is a bug, but rounds that are waited for must end.
            let answer = catch_unwind(AssertUnwindSafe(|| self.follow(&heard)));
            let answer = answer.unwrap_or_else(|_| Err("the node panicked".into()));
            if let Order::Round(round, Some(job)) = &heard.order {
                job.together.over(round.layer, (heard.epoch, round.number));
            }
            let answer = match answer {
                Ok(answer) => answer,
                Err(why) => {
                    self.member = None;
                    tracing::warn!(epoch = heard.epoch, why, "out of the group");
                    Some(GroupAnswer::Failed(why))
                }
            };
            if let (Some(answer), Some(line)) = (answer, heard.answer) {
                let body = Some(Body::Group(wire::GroupAnswer::from((heard.epoch, answer))));
                // Without a stream nobody wants to know; with a full one the coordinator's patience ends.
                let _ = line.try_send(NodeMessage { body });
            }
        }
    }

    fn follow(&mut self, heard: &Heard) -> Result<Option<GroupAnswer>, String> {
        if self.member.as_ref().is_some_and(|member| member.epoch != heard.epoch) {
            self.member = None;
        }
        if let Order::Leave = heard.order {
            self.leave();
            return Ok(None);
        }
        if heard.ended.load(Ordering::Acquire) {
            self.member = None;
            return Ok(None);
        }
        let given_up = || heard.ended.load(Ordering::Acquire);
        match &heard.order {
            Order::Name => {
                let id = self.exchange.library().unique_id().map_err(|error| error.to_string())?;
                Ok(Some(GroupAnswer::Named(id.bytes().to_vec().into())))
            }
            Order::Join { id, place } => {
                let patience = Patience { limit: JOIN, given_up: &given_up };
                self.join(heard.epoch, id, *place, &patience)?;
                Ok(Some(GroupAnswer::Joined))
            }
            Order::Round(round, job) => {
                let patience = Patience { limit: ADD, given_up: &given_up };
                self.round(round, job.as_deref(), &patience)?;
                Ok(Some(GroupAnswer::Added(round.number)))
            }
            Order::Leave => Ok(None),
        }
    }

    fn join(&mut self, epoch: u64, id: &[u8], place: Place, patience: &Patience<'_>) -> Result<(), String> {
        let joined = UniqueId::new(id).and_then(|id| {
            let memory = self.exchange.memory(self.node.devices())?;
            Communicator::join(self.exchange.library(), id, place, memory, patience)
        });
        let group = joined.map_err(|error| error.to_string())?;
        tracing::info!(epoch, rank = place.rank, size = place.size, "in a group");
        self.member = Some(Membership { epoch, group, next: 0 });
        Ok(())
    }

    fn round(&mut self, round: &Round, job: Option<&Job>, patience: &Patience<'_>) -> Result<(), String> {
        let member = self.member.as_mut().ok_or("a round without a group")?;
        if round.number != member.next {
            return Err(format!("round {}: expected round {}", round.number, member.next));
        }
        let job = job.ok_or_else(|| format!("job {}: is not open here", round.job))?;
        member.next += 1;
        let added = job.add_up(member.epoch, round, &mut member.group, patience);
        added.map_err(|error| error.to_string())?;
        tracing::info!(epoch = member.epoch, round = round.number, layer = %round.layer, "added up");
        Ok(())
    }

    /// In good order if it is at rest, else it is aborted.
    fn leave(&mut self) {
        let Some(member) = self.member.take().filter(|member| !member.group.is_over()) else { return };
        if let Err(error) = member.group.leave(&Patience { limit: LEAVE, given_up: &|| false }) {
            tracing::debug!(%error, "the group was aborted");
        }
    }
}
