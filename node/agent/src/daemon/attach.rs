//! One attachment to a coordinator, from the first word to the loss of the stream.
//!
//! This is the only task that speaks on the stream; it computes nothing and waits for nobody but the coordinator, so
//! heartbeats go out in time.
//! Not here: attaching again (`run`), outcomes of leases, which have calls of their own (`report`).

use super::apart::apart;
use super::handover::take_over;
use super::jobs::JobOrder;
use super::leases::InHand;
use super::line::measure;
use super::options::DaemonEvent;
use super::report::{give_back_unread, hand_back};
use super::run::{DRAIN, Session, Shared};
use halfstep_proto::wire::coordinator_message::Body as Said;
use halfstep_proto::wire::fleet_client::FleetClient;
use halfstep_proto::wire::node_message::Body;
use halfstep_proto::wire::{self, CoordinatorMessage, NodeMessage};
use halfstep_proto::{Role, WireError, check_hello, explain, hello, job_from_wire};
use halfstep_work::{Grant, GroupOrder, Holding, LeaseId, Node, NodeDescription, NodeId, SegmentId};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// Time for the coordinator's first word.
const WELCOME: Duration = Duration::from_secs(10);
/// What a coordinator may ask heartbeats to be.
const HEARTBEAT: std::ops::RangeInclusive<u64> = 5..=60_000;
/// Messages that wait to be sent.
const QUEUE: usize = 64;

/// How an attachment ended.
pub(super) enum End {
    /// The node has left as it wished.
    Drained,
    /// The coordinator does not want it.
    Refused {
        /// The coordinator's words.
        reason: String,
        /// Whether the node had been part of the fleet: what is against the node itself is said again at the next try.
        attached: bool,
    },
    /// The stream is gone, or there was none.
    Lost {
        /// What happened.
        why: String,
        /// Whether the node had been part of the fleet.
        attached: bool,
    },
}

fn lost(status: &Status) -> End {
    match status.code() {
        Code::FailedPrecondition | Code::PermissionDenied => {
            End::Refused { reason: status.message().to_owned(), attached: false }
        }
        _ => End::Lost { why: explain(status), attached: false },
    }
}

/// Attaches and stays as long as it lasts.
pub(super) async fn attach(
    shared: &Arc<Shared>,
    address: &str,
    orders: &mpsc::UnboundedSender<JobOrder>,
) -> End {
    let begun = tokio::select! {
        begun = begin(shared, address) => begun,
        _ = shared.drain.wait() => {
            shared.tell(DaemonEvent::Draining);
            return End::Drained;
        }
    };
    match begun {
        Ok(attachment) => {
            let end = attachment.last(shared, orders).await;
            if let Some(group) = &shared.group {
                group.detached();
            }
            shared.session.send_replace(None);
            end
        }
        Err(end) => end,
    }
}

/// A stream that has been welcomed.
struct Attachment {
    out: mpsc::Sender<NodeMessage>,
    said: Streaming<CoordinatorMessage>,
    heartbeat: Duration,
    /// When the node has to be gone.
    leaving: Option<Instant>,
}

/// Connects, introduces the node, waits to be welcomed.
async fn begin(shared: &Arc<Shared>, address: &str) -> Result<Attachment, End> {
    let never = |why: String| End::Lost { why, attached: false };
    let connector = shared.options.transport.connector(&shared.options.coordinator, Role::Coordinator);
    let channel = connector.connect().await.map_err(|error| never(error.to_string()))?;
    let (out, outgoing) = mpsc::channel(QUEUE);
    // The queue is new: there is room.
    let _ = out.send(NodeMessage { body: Some(Body::Attach(introduction(shared, address))) }).await;
    let mut client = FleetClient::new(channel.clone());
    let answered = async {
        let mut said = client.attach(ReceiverStream::new(outgoing)).await?.into_inner();
        let first = said.message().await?;
        Ok::<_, Status>((said, first))
    };
    let answered = timeout(WELCOME, answered).await;
    let (said, first) = answered
        .map_err(|_| never(format!("no word within {WELCOME:?}")))?
        .map_err(|status| lost(&status))?;
    let welcome = match first.and_then(|message| message.body) {
        Some(Said::Welcome(welcome)) => welcome,
        Some(Said::Refused(wire::Refused { reason, .. })) => {
            return Err(End::Refused { reason, attached: false });
        }
        Some(Said::Farewell(farewell)) => return Err(never(farewell.reason)),
        other => return Err(never(format!("expected a welcome, found {other:?}"))),
    };
    check_hello(&welcome.hello, "the coordinator").map_err(|status| lost(&status))?;
    settle_in(shared, &welcome, channel).await;
    let heartbeat = Duration::from_millis(welcome.heartbeat_ms.clamp(*HEARTBEAT.start(), *HEARTBEAT.end()));
    Ok(Attachment { out, said, heartbeat, leaving: None })
}

fn introduction(shared: &Shared, address: &str) -> wire::Attach {
    let described = NodeDescription { name: shared.options.name.clone(), ..shared.node.describe() };
    let registered = *shared.registered.lock().unwrap_or_else(PoisonError::into_inner);
    wire::Attach {
        hello: Some(hello()),
        description: Some((&described).into()),
        address: address.to_owned(),
        previous_node: registered.map(|(node, _)| node.0),
        previous_epoch: registered.map_or(0, |(_, epoch)| epoch),
    }
}

/// A registration that was declared lost takes its leases and sums with it; then the new one begins.
async fn settle_in(shared: &Arc<Shared>, welcome: &wire::Welcome, channel: Channel) {
    if welcome.fenced {
        shared.leases.abandon(|_| true);
        let node = Arc::clone(&shared.node);
        if let Err(error) = tokio::task::spawn_blocking(move || node.fence()).await {
            tracing::error!(%error, "sums not forgotten");
        }
    }
    let (node, epoch) = (NodeId(welcome.node), welcome.epoch);
    *shared.registered.lock().unwrap_or_else(PoisonError::into_inner) = Some((node, epoch));
    shared.session.send_replace(Some(Session { node, epoch, channel, opened: None }));
    tracing::info!(%node, epoch, fenced = welcome.fenced, "attached");
    shared.tell(DaemonEvent::Attached { coordinator: shared.options.coordinator.clone(), node });
}

impl Attachment {
    async fn last(mut self, shared: &Arc<Shared>, orders: &mpsc::UnboundedSender<JobOrder>) -> End {
        let mut beat = interval(self.heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let deadline = self.leaving;
            tokio::select! {
                _ = beat.tick() => self.say(Body::Heartbeat(heartbeat(shared))),
                said = self.said.message() => {
                    let gone = |why| Some(End::Lost { why, attached: true });
                    let end = match said {
                        Ok(Some(message)) => self.hear(shared, orders, message).await,
                        Ok(None) => gone("the coordinator closed the stream".to_owned()),
                        Err(status) => gone(explain(&status)),
                    };
                    match end {
                        Some(_) if self.leaving.is_some() => return End::Drained,
                        Some(end) => return end,
                        None => {}
                    }
                }
                reason = shared.drain.wait(), if deadline.is_none() => self.drain(shared, reason),
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    return End::Drained;
                }
            }
        }
    }

    /// A full queue means that the connection stands still: heartbeats that would come late are of no use.
    fn say(&self, body: Body) {
        if self.out.try_send(NodeMessage { body: Some(body) }).is_err() {
            tracing::debug!("a message to the coordinator was left out");
        }
    }

    fn drain(&mut self, shared: &Arc<Shared>, reason: String) {
        shared.tell(DaemonEvent::Draining);
        self.leaving = Some(Instant::now() + DRAIN);
        hand_back(shared, &reason);
        self.say(Body::Drain(wire::Drain { reason }));
    }

    /// Does as told, unless it is the end. What makes no sense is left out: it is no reason to drop all that is in hand.
    async fn hear(
        &self,
        shared: &Arc<Shared>,
        orders: &mpsc::UnboundedSender<JobOrder>,
        message: CoordinatorMessage,
    ) -> Option<End> {
        let gone = |why| Some(End::Lost { why, attached: true });
        let done = match message.body {
            Some(Said::Open(open)) => {
                // Orders are followed for as long as the daemon lives.
                let _ = orders.send(JobOrder::Open(open, self.out.clone()));
                Ok(())
            }
            Some(Said::Close(close)) => {
                job_from_wire(&close.job).map(|job| drop(orders.send(JobOrder::Close(job))))
            }
            Some(Said::Grant(grant)) => {
                self.take(shared, grant);
                Ok(())
            }
            Some(Said::Revoke(revoke)) => {
                tracing::info!(lease = revoke.lease, why = revoke.why, "lease revoked");
                let revoked = LeaseId(revoke.lease);
                shared.leases.abandon(|lease| lease.id() == revoked);
                Ok(())
            }
            Some(Said::DropSums(passed)) => {
                drop_sums(shared, SegmentId(passed.segment)).await;
                Ok(())
            }
            Some(Said::Drain(drain)) => {
                tracing::info!(reason = drain.reason, "asked to leave");
                shared.drain.begin(&drain.reason);
                Ok(())
            }
            Some(Said::Measure(asked)) => {
                tokio::spawn(measure(Arc::clone(shared), asked, self.out.clone()));
                Ok(())
            }
            Some(Said::TakeOver(order)) => self.take_over(shared, order),
            Some(Said::Group(order)) => {
                <(u64, GroupOrder)>::try_from(order).map(|order| self.group(shared, order))
            }
            Some(Said::Farewell(farewell)) => return gone(farewell.reason),
            Some(Said::Refused(wire::Refused { reason, job })) if job.is_empty() => {
                return Some(End::Refused { reason, attached: true });
            }
            Some(Said::Refused(wire::Refused { reason, job })) => job_from_wire(&job).map(|job| {
                drop(orders.send(JobOrder::Close(job)));
                shared.tell(DaemonEvent::LeftOut { job, reason });
            }),
            Some(Said::Welcome(_)) | None => Err(WireError::new("message", "means nothing here")),
        };
        if let Err(error) = done {
            tracing::warn!(%error, "a message of the coordinator is left out");
        }
        None
    }

    /// A node that cannot be in a group has not said that it can.
    fn group(&self, shared: &Shared, order: (u64, GroupOrder)) {
        match &shared.group {
            Some(group) => group.hear(order, &shared.node, || shared.open_job(), &self.out),
            None => tracing::warn!("an order of a group is left out"),
        }
    }

    fn take_over(&self, shared: &Arc<Shared>, order: wire::TakeOver) -> Result<(), WireError> {
        let job = job_from_wire(&order.job)?;
        let carries = order.carries.into_iter().map(Holding::try_from).collect::<Result<Vec<_>, _>>()?;
        let (shared, out) = (Arc::clone(shared), self.out.clone());
        tokio::spawn(async move {
            if let Err(why) = apart("take over", move || take_over(&shared, job, &carries, &out)).await {
                tracing::error!(why, "carries of a node that leaves are not taken over");
            }
        });
        Ok(())
    }

    /// A grant that cannot be read goes back at once: the task may suit another node.
    fn take(&self, shared: &Arc<Shared>, grant: wire::Grant) {
        let lease = grant.lease.as_ref().map(|lease| (lease.id, lease.attempt)).unwrap_or_default();
        match job_from_wire(&grant.job).map(|job| (job, Grant::try_from(grant))) {
            Ok((job, Ok(grant))) => shared.leases.take(InHand::new(job, shared.epoch(), grant)),
            Ok((job, Err(error))) => {
                tokio::spawn(give_back_unread(Arc::clone(shared), job, lease, error));
            }
            Err(error) => tracing::warn!(%error, lease = lease.0, "a grant of no job is left out"),
        }
        if let Some(reason) = self.leaving.and(shared.drain.asked()) {
            hand_back(shared, &reason);
        }
    }
}

/// Before anything said later is done: what is summed from now on is not to be dropped with it.
async fn drop_sums(shared: &Shared, stage: SegmentId) {
    let node = Arc::clone(&shared.node);
    if let Err(error) = tokio::task::spawn_blocking(move || node.drop_sums(stage)).await {
        tracing::error!(%error, %stage, "sums not dropped");
    }
}

fn heartbeat(shared: &Shared) -> wire::Heartbeat {
    let progress = shared.leases.progress().into_iter();
    wire::Heartbeat {
        leases: progress.map(|(lease, progress)| wire::LeaseProgress { lease: lease.0, progress }).collect(),
        held_bytes: shared.held_bytes.load(Ordering::Relaxed),
        bytes_sent: shared.traffic.sent(),
        bytes_fetched: shared.traffic.received(),
    }
}
