//! Daemons in this process and a coordinator that takes a job through all of its phases over them.
//!
//! Not here: what a test does to them.

use super::coordinator::{Attached, Coordinator, JOB, soon};
use halfstep_agent::{
    DaemonError, DaemonEvent, DaemonOptions, Drain, Exchange, LocalNode, NodeDaemon, NodeOptions, RtenEngine,
};
use halfstep_proto::DoneRef;
use halfstep_work::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A daemon in this process.
pub struct Running {
    pub node: Arc<LocalNode>,
    pub drain: Drain,
    pub ended: JoinHandle<Result<(), DaemonError>>,
    pub events: mpsc::UnboundedReceiver<DaemonEvent>,
    pub spill: TempDir,
}

pub fn start(coordinator: &Coordinator, name: &str) -> Running {
    start_exchanging(coordinator, name, None)
}

/// Same, adding up in groups by this.
pub fn start_exchanging(coordinator: &Coordinator, name: &str, exchange: Option<Exchange>) -> Running {
    let spill = TempDir::new().unwrap();
    let options = NodeOptions { threads: 2, memory_budget: 1 << 20, spill_dir: spill.path().into() };
    let options_of_daemon = DaemonOptions {
        name: name.into(),
        coordinator: coordinator.address.clone(),
        transport: coordinator.transport.clone(),
        listen: String::new(),
        advertise: None,
    };
    let node = LocalNode::new(Box::new(RtenEngine::default()), options);
    let node = match exchange {
        Some(exchange) => node.exchanging_by(exchange),
        None => node,
    };
    let daemon = NodeDaemon::new(node, options_of_daemon);
    let (node, drain) = (daemon.node(), Drain::new());
    let (told, events) = mpsc::unbounded_channel();
    let run = daemon.run(drain.clone(), move |event| drop(told.send(event)));
    Running { node, drain, ended: tokio::spawn(run), events, spill }
}

impl Running {
    pub async fn event(&mut self) -> DaemonEvent {
        soon("event", self.events.recv()).await.unwrap()
    }

    pub async fn end(self) -> Result<(), DaemonError> {
        soon("end", self.ended).await.unwrap()
    }

    /// Lives until the end of the test.
    pub fn left_to_itself(self) -> Arc<LocalNode> {
        std::mem::forget(self.spill);
        self.node
    }
}

pub fn done(commit: halfstep_proto::Commit) -> DoneRef {
    commit.outcome.unwrap()
}

pub fn peaks(commit: halfstep_proto::Commit) -> Vec<PeakRecord> {
    let DoneRef::Captured { peaks } = done(commit) else { panic!("no peaks") };
    peaks
}

/// A job's whole way over nodes that fetch from each other or add up in a group.
pub struct Driver {
    pub coordinator: Coordinator,
    pub nodes: Vec<(Attached, Arc<LocalNode>)>,
    pub turn: usize,
    /// Epoch of their group and its next round, if there is one.
    pub group: Option<(u64, u64)>,
    /// Bytes that tasks of reducing and solving have fetched.
    pub fetched: u64,
}

impl Driver {
    pub fn new(coordinator: Coordinator, nodes: Vec<(Attached, Arc<LocalNode>)>) -> Self {
        Self { coordinator, nodes, turn: 0, group: None, fetched: 0 }
    }

    /// What is committed.
    pub fn roundings(&self) -> BTreeMap<(LayerId, ChunkId), Rounding> {
        let hashes = self.coordinator.state.roundings.lock().unwrap().clone();
        hashes.into_iter().map(|(key, hash)| (key, self.coordinator.rounding(hash))).collect()
    }

    /// Orders the next round of the group: each node gives what is in its sums.
    pub async fn round(&mut self, layer: LayerId, segment: SegmentId, peaks: &[PeakRecord]) {
        let Some((epoch, number)) = &mut self.group else { return };
        for (attached, node) in &self.nodes {
            let shards = node.inventory().held.into_iter().find_map(|held| match held {
                Held::Sums { segment: s, shards } if s == segment => Some(shards),
                _ => None,
            });
            let peaks = peaks.iter().filter(|peak| peak.layer == layer).copied().collect();
            let round = Round { job: JOB, number: *number, layer, shards: shards.unwrap_or_default(), peaks };
            attached.order(*epoch, GroupOrder::Round(round)).await;
        }
        *number += 1;
    }

    /// Everything held, with addresses.
    fn holdings(&self) -> Vec<Holding> {
        let of = |(at, (attached, node)): (usize, &(Attached, Arc<LocalNode>))| {
            let (node_id, address) = (NodeId(at as u32), attached.introduction.address.clone());
            let held = node.inventory().held.into_iter();
            held.map(move |held| Holding { node: node_id, address: address.clone(), held })
                .collect::<Vec<_>>()
        };
        self.nodes.iter().enumerate().flat_map(of).collect()
    }

    /// The tasks in turn on all nodes, at most as many at once as there are nodes.
    pub async fn all(&mut self, tasks: Vec<Task>) -> Vec<halfstep_proto::Commit> {
        let mut commits = Vec::new();
        for tasks in tasks.chunks(self.nodes.len()) {
            let holdings = self.holdings();
            for task in tasks {
                let node = self.turn % self.nodes.len();
                self.turn += 1;
                let lease = self.coordinator.lease(node as u32, task.clone());
                self.nodes[node].0.grant(lease, holdings.clone()).await;
            }
            for _ in tasks {
                let commit = self.coordinator.outcome().await;
                assert!(commit.outcome.is_ok(), "{commit:?}");
                if let Ok(DoneRef::Reduced | DoneRef::Solved(_)) = &commit.outcome {
                    self.fetched += commit.cost.bytes_fetched;
                }
                commits.push(commit);
            }
        }
        commits
    }

    pub async fn stage(&mut self, segment: SegmentId) {
        let plan = self.coordinator.plan();
        let shards = || plan.shard_ids();
        let mut agreed = Vec::new();
        for commit in self.all(shards().map(|shard| Task::Capture { segment, shard }).collect()).await {
            agree_peaks(&mut agreed, &peaks(commit));
        }
        let agreed = Arc::new(agreed);
        let accumulate = |shard| Task::Accumulate { segment, shard, peaks: Arc::clone(&agreed) };
        self.all(shards().map(accumulate).collect()).await;
        let summed = async {
            let count = |held: &Held| match held {
                Held::Sums { segment: s, shards } if *s == segment => shards.len(),
                _ => 0,
            };
            while self.holdings().iter().map(|h| count(&h.held)).sum::<usize>() < plan.shards.len() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        soon("all shards summed", summed).await;
        for layer in plan.stages[segment.index()].solve.clone() {
            if plan.layer(layer).statistics_of.is_none() {
                self.round(layer, segment, &agreed).await;
            }
            self.all(plan.slice_ids(layer).map(|slice| Task::Reduce { layer, slice }).collect()).await;
            self.all(plan.chunk_ids(layer).map(|chunk| Task::Solve { layer, chunk }).collect()).await;
        }
    }
}
