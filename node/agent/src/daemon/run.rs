//! The life of a daemon: listening, attached, waiting for a coordinator, attached again, drained.
//!
//! Not here: what is said while attached (`attach`).

use super::artefacts::HeldState;
use super::attach::{End, attach};
use super::group::GroupLine;
use super::jobs::{JobOrder, follow};
use super::leases::Leases;
use super::options::{DaemonError, DaemonEvent, DaemonOptions, Drain};
use super::report::report;
use super::source::Lines;
use super::telemetry;
use super::workers::Workers;
use crate::LocalNode;
use halfstep_proto::Services;
use halfstep_proto::data::Traffic;
use halfstep_proto::wire::artefacts_server::ArtefactsServer;
use halfstep_work::{JobId, Node, NodeId};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tonic::transport::Channel;
use tracing::Instrument;

/// Between two tries to attach: the first, and at most.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// After a refusal in the middle of an attachment.
const PAUSE_REFUSED: Duration = Duration::from_secs(5);
/// From the wish to leave until the process has left, workers that do not listen or not.
pub(super) const DRAIN: Duration = Duration::from_millis(4500);

/// The registration of the moment.
#[derive(Clone)]
pub(super) struct Session {
    pub(super) node: NodeId,
    pub(super) epoch: u64,
    pub(super) channel: Channel,
    /// The job that this registration was told of, and when: from then on the coordinator knows the leases in hand.
    pub(super) opened: Option<(JobId, Instant)>,
}

/// What all parts of a daemon know.
pub(super) struct Shared {
    pub(super) node: Arc<LocalNode>,
    pub(super) options: DaemonOptions,
    pub(super) drain: Drain,
    pub(super) leases: Arc<Leases>,
    pub(super) lines: Arc<Lines>,
    pub(super) traffic: Traffic,
    /// None if the node cannot be in a group.
    pub(super) group: Option<GroupLine>,
    /// None while there is no coordinator.
    pub(super) session: watch::Sender<Option<Session>>,
    /// The latest registration, over or not.
    pub(super) registered: Mutex<Option<(NodeId, u64)>>,
    open_job: Mutex<Option<JobId>>,
    /// Bytes of carries in memory after the latest task: heartbeats do not wait for who moves them.
    pub(super) held_bytes: AtomicU64,
    events: Box<dyn Fn(DaemonEvent) + Send + Sync>,
}

impl Shared {
    /// Remembers that the coordinator has been told what there is of a job.
    pub(super) fn told(&self, job: JobId) {
        self.session.send_if_modified(|session| {
            let Some(session) = session else { return false };
            session.opened = Some((job, Instant::now()));
            true
        });
    }

    /// Incarnation of the coordinator of the latest registration.
    pub(super) fn epoch(&self) -> u64 {
        let registered = *self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        registered.map_or(0, |(_, epoch)| epoch)
    }

    pub(super) fn open_job(&self) -> Option<JobId> {
        *self.open_job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_open_job(&self, job: Option<JobId>) {
        *self.open_job.lock().unwrap_or_else(PoisonError::into_inner) = job;
    }

    pub(super) fn tell(&self, event: DaemonEvent) {
        (self.events)(event);
    }
}

/// A node that takes part in a fleet.
pub struct NodeDaemon {
    node: Arc<LocalNode>,
    options: DaemonOptions,
}

impl NodeDaemon {
    /// Nothing happens yet.
    pub fn new(node: LocalNode, options: DaemonOptions) -> Self {
        Self { node: Arc::new(node), options }
    }

    /// The node inside.
    pub fn node(&self) -> Arc<LocalNode> {
        Arc::clone(&self.node)
    }

    /// Takes part until drained, attaching again for ever. Needs a runtime with time and I/O; threads of its own compute.
    ///
    /// # Errors
    /// `Transport` if the address cannot be had, `Refused` if the coordinator does not want this node, `Thread`.
    pub async fn run(
        self,
        drain: Drain,
        events: impl Fn(DaemonEvent) + Send + Sync + 'static,
    ) -> Result<(), DaemonError> {
        let listener = self.options.transport.listen(&self.options.listen).await?;
        let address = advertised(self.options.advertise.as_deref(), listener.address());
        let shared = self.shared(drain, Box::new(events))?;
        shared.tell(DaemonEvent::Listening { address: address.clone() });
        let services = Services::new().with(ArtefactsServer::new(HeldState(Arc::clone(&shared))));
        let _serving = Aborted(tokio::spawn(async move {
            if let Err(error) = services.serve(listener, std::future::pending()).await {
                tracing::error!(%error, "data plane ended");
            }
        }));
        let _looking = [
            Aborted(tokio::spawn(telemetry::look(Arc::clone(&shared)))),
            Aborted(tokio::spawn(telemetry::look_patiently(Arc::clone(&shared)))),
        ];
        let workers = start_workers(&shared)?;
        let (orders, ordered) = mpsc::unbounded_channel();
        let _following = Aborted(tokio::spawn(follow(Arc::clone(&shared), ordered)));
        let ended = stay_attached(&shared, &address, &orders).await;
        let stopped = Instant::now();
        drop(orders);
        leave(&shared, workers, stopped).await;
        ended
    }

    fn shared(
        self,
        drain: Drain,
        events: Box<dyn Fn(DaemonEvent) + Send + Sync>,
    ) -> Result<Arc<Shared>, DaemonError> {
        let traffic = Traffic::default();
        let DaemonOptions { transport, coordinator, .. } = &self.options;
        let lines = Lines::new(transport.clone(), coordinator, traffic.clone(), Handle::current());
        let exchange = self.node.exchange().cloned();
        let group = exchange.map(|exchange| GroupLine::start(&self.node, exchange)).transpose();
        Ok(Arc::new(Shared {
            group: group.map_err(DaemonError::Thread)?,
            node: self.node,
            options: self.options,
            drain,
            leases: Arc::default(),
            lines: Arc::new(lines),
            traffic,
            session: watch::Sender::new(None),
            registered: Mutex::default(),
            open_job: Mutex::default(),
            held_bytes: AtomicU64::new(0),
            events,
        }))
    }
}

/// Where others are told to come: a host without a port gets the port that was taken.
fn advertised(asked: Option<&str>, listening: String) -> String {
    match (asked, listening.rsplit_once(':')) {
        (Some(host), Some((_, port))) if !host.contains(':') => format!("{host}:{port}"),
        (Some(address), _) => address.to_owned(),
        (None, _) => listening,
    }
}

/// A task that does not outlive the daemon.
struct Aborted(JoinHandle<()>);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn start_workers(shared: &Arc<Shared>) -> Result<Workers, DaemonError> {
    let (reporter, runtime) = (Arc::clone(shared), Handle::current());
    Workers::start(&shared.node, &shared.leases, move |lease, outcome| {
        reporter.held_bytes.store(reporter.node.carry_use().resident as u64, Ordering::Relaxed);
        let span = lease.span.clone();
        runtime.spawn(report(Arc::clone(&reporter), lease, outcome).instrument(span));
    })
}

/// Attaches, and again after every loss.
async fn stay_attached(
    shared: &Arc<Shared>,
    address: &str,
    orders: &mpsc::UnboundedSender<JobOrder>,
) -> Result<(), DaemonError> {
    let coordinator = shared.options.coordinator.clone();
    let mut pause = PAUSE;
    let mut told = String::new();
    while shared.drain.asked().is_none() {
        let began = Instant::now();
        let why = match attach(shared, address, orders).await {
            End::Drained => return Ok(()),
            End::Refused { reason, attached: false } => {
                return Err(DaemonError::Refused { coordinator, reason });
            }
            End::Refused { reason, attached: true } => {
                pause = PAUSE_REFUSED;
                told.clear();
                format!("it refused this node: {reason}")
            }
            End::Lost { why, attached } => {
                if attached {
                    told.clear();
                }
                if began.elapsed() > PAUSE_MAX {
                    pause = PAUSE;
                }
                why
            }
        };
        if why != told {
            tracing::info!(coordinator, why, "waiting");
            shared.tell(DaemonEvent::Waiting { coordinator: coordinator.clone(), why: why.clone() });
            told = why;
        }
        tokio::select! {
            () = sleep(jittered(pause)) => {}
            _ = shared.drain.wait() => {}
        }
        pause = PAUSE_MAX.min(pause * 2);
    }
    shared.tell(DaemonEvent::Draining);
    Ok(())
}

/// Between half of it and all of it, so that nodes that lost a coordinator together do not return together.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().hash_one(0u8) as u32;
    pause / 2 + pause.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
}

/// Stops the workers; those that do not listen are left to the end of the process.
async fn leave(shared: &Arc<Shared>, workers: Workers, since: Instant) {
    shared.leases.abandon(|_| true);
    shared.leases.stop();
    while !workers.ended() && since.elapsed() < DRAIN / 10 {
        sleep(Duration::from_millis(10)).await;
    }
    shared.set_open_job(None);
    shared.node.close();
}
