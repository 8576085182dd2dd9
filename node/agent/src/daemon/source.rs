//! Where a node of a fleet fetches from: the coordinator's data plane and those of other nodes.
//!
//! The coordinator may be away for a while: what only it has is asked for again until it is back, for a bounded time.
//! Other nodes are asked once; their state can be had elsewhere or made again.
//! Not here: streams, checksums (`proto::data`).

use super::shared_model::SharedModel;
use super::store::Store;
use bytes::Bytes;
use halfstep_proto::data::{BlockingData, DataClient, Fetched, Patience, Traffic};
use halfstep_proto::{BlobHash, BlobName, Fetch, Role, Transport, WireError, rounding, tensors};
use halfstep_work::{
    ChunkId, FailureClass, Holding, InputTensor, JobId, LayerId, Plan, Rounding, ShardId, Source,
    SourceError, Wanted,
};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Largest blob that is taken.
const BLOB_MAX: u64 = 64 << 30;
/// Constants and roundings that are kept, each, at most.
const KEEP_BYTES: usize = 64 << 20;
/// Part of the memory budget that either may take: they are beside the budget, and can be fetched again.
const KEEP_PART: usize = 16;
/// How long the coordinator may be away before a task fails for it.
const COORDINATOR_AWAY: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(250);

/// Time for the first sign of an answer from the coordinator.
const COORDINATOR_ANSWER: Duration = Duration::from_secs(5);
/// The same from another node, which may have to gather what is asked for first, over a slow line. One that is frozen
/// never answers, and holds up whoever asks it for this long, twice.
const NODE_ANSWER: Duration = Duration::from_secs(15);

/// Lines to every data plane, for all jobs of a daemon.
pub(super) struct Lines {
    transport: Transport,
    coordinator: DataClient,
    nodes: Mutex<BTreeMap<String, DataClient>>,
    traffic: Traffic,
    runtime: Handle,
}

impl Lines {
    pub(super) fn new(transport: Transport, coordinator: &str, traffic: Traffic, runtime: Handle) -> Self {
        let connector = transport.connector(coordinator, Role::Coordinator);
        // Nobody else has what it has: asked again and again, and soon, since an answer that was under way when the
        // coordinator died never comes.
        let patience = Patience { attempts: 24, header: COORDINATOR_ANSWER, ..Patience::default() };
        let coordinator = DataClient::new(&connector, traffic.clone()).with_patience(patience);
        Self { transport, coordinator, nodes: Mutex::default(), traffic, runtime }
    }

    /// The coordinator's.
    pub(super) fn coordinator(&self) -> &DataClient {
        &self.coordinator
    }

    /// A node's, for code that blocks.
    fn node(&self, address: &str) -> BlockingData {
        BlockingData::new(self.client(address), self.runtime.clone())
    }

    /// A node's. Another one can make what it has: little patience.
    pub(super) fn client(&self, address: &str) -> DataClient {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let client = nodes.entry(address.to_owned()).or_insert_with(|| {
            let patience = Patience { attempts: 2, header: NODE_ANSWER, ..Patience::default() };
            // A channel starts a task of its own, and this is a worker's thread.
            let _runtime = self.runtime.enter();
            let connector = self.transport.connector(address, Role::Node);
            DataClient::new(&connector, self.traffic.clone()).with_patience(patience)
        });
        client.clone()
    }
}

/// The source of one job. Calls block: for worker threads.
pub(super) struct RemoteSource {
    job: JobId,
    lines: Arc<Lines>,
    shared: SharedModel,
    program: Mutex<Option<Bytes>>,
    constants: Store<String, InputTensor>,
    roundings: Store<(LayerId, ChunkId), Option<Arc<Rounding>>>,
}

impl RemoteSource {
    /// `budget`: the node's memory budget, bytes.
    pub(super) fn new(job: JobId, lines: Arc<Lines>, shared: SharedModel, budget: usize) -> Self {
        let keep = KEEP_BYTES.min(budget / KEEP_PART);
        let (constants, roundings) = (Store::new(keep), Store::new(keep));
        Self { job, lines, shared, program: Mutex::default(), constants, roundings }
    }

    /// The job's plan.
    pub(super) fn plan(&self, hash: BlobHash) -> Result<Plan, SourceError> {
        let bytes = self.blob(BlobName::Artefact(hash))?;
        let plan: Plan = serde_json::from_slice(&bytes).map_err(|error| damaged("plan", &error))?;
        plan.validate().map_err(|error| damaged("plan", &error))?;
        Ok(plan)
    }

    /// From the coordinator, waiting for it while it is away.
    fn fetch(&self, name: &BlobName, have: Option<BlobHash>) -> Result<Fetched, SourceError> {
        let data = BlockingData::new(self.lines.coordinator.clone(), self.lines.runtime.clone());
        let begun = Instant::now();
        loop {
            let fetch = Fetch { have, ..Fetch::new(self.job, name.clone()) };
            match data.fetch(fetch, BLOB_MAX) {
                Err(error) if error.class == FailureClass::PeerLost && begun.elapsed() < COORDINATOR_AWAY => {
                    sleep(PAUSE);
                }
                done => return done,
            }
        }
    }

    fn blob(&self, name: BlobName) -> Result<Bytes, SourceError> {
        match self.fetch(&name, None)? {
            Fetched::Blob { bytes, .. } => Ok(bytes),
            other => Err(nonsense(&name, &other)),
        }
    }
}

fn damaged(subject: &str, error: &dyn std::fmt::Display) -> SourceError {
    SourceError::new(FailureClass::Damaged, format!("{subject}: {error}"))
}

fn wire(error: WireError) -> SourceError {
    SourceError::new(FailureClass::Damaged, error)
}

fn nonsense(name: &BlobName, came: &Fetched) -> SourceError {
    SourceError::new(FailureClass::Internal, format!("{name:?}: expected a blob, found {came:?}"))
}

impl Source for RemoteSource {
    fn program(&self) -> Result<Bytes, SourceError> {
        let mut program = self.program.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = program.as_ref() {
            return Ok(known.clone());
        }
        let fetched = self.blob(BlobName::Program)?;
        *program = Some(fetched.clone());
        Ok(fetched)
    }

    fn constant(&self, name: &str) -> Result<InputTensor, SourceError> {
        if let Some(known) = self.constants.get(&name.to_owned()) {
            return Ok(known);
        }
        let local = self.shared.constant(name);
        let have = match &local {
            Some(local) => Some(tensors::hash(local).map_err(wire)?),
            None => None,
        };
        let asked = BlobName::Constant(name.to_owned());
        let found = match (self.fetch(&asked, have)?, local) {
            (Fetched::Same, Some(local)) => local,
            (Fetched::Blob { bytes, .. }, _) => {
                let found = tensors::decode(&bytes).map_err(wire)?.pop();
                found.ok_or_else(|| damaged("constant", &"an empty blob"))?
            }
            (other, _) => return Err(nonsense(&asked, &other)),
        };
        if found.name != name {
            return Err(damaged(&format!("constant `{name}`"), &format!("`{}` came instead", found.name)));
        }
        self.constants.put(name.to_owned(), found.clone(), found.bytes.len());
        Ok(found)
    }

    fn inputs(&self, shard: ShardId) -> Result<Vec<InputTensor>, SourceError> {
        tensors::decode(&self.blob(BlobName::Inputs(shard))?).map_err(wire)
    }

    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Option<Arc<Rounding>>, SourceError> {
        if let Some(known) = self.roundings.get(&(layer, chunk)) {
            return Ok(known);
        }
        let name = BlobName::Rounding { layer, chunk };
        let found = match self.fetch(&name, None)? {
            Fetched::None => None,
            Fetched::Blob { bytes, .. } => Some(Arc::new(rounding::decode(&bytes).map_err(wire)?)),
            other => return Err(nonsense(&name, &other)),
        };
        if let Some(found) = found.as_ref().filter(|found| (found.layer, found.chunk) != (layer, chunk)) {
            let came = format!("{}, {} came instead", found.layer, found.chunk);
            return Err(damaged(&format!("rounding of {layer}, {chunk}"), &came));
        }
        let bytes = found.as_ref().map_or(0, |found| found.q.len() * size_of::<i32>());
        self.roundings.put((layer, chunk), found.clone(), bytes);
        Ok(found)
    }

    fn held(&self, holder: &Holding, wanted: &Wanted) -> Result<Bytes, SourceError> {
        let name = BlobName::Held(wanted.clone());
        match self.lines.node(&holder.address).fetch(Fetch::new(self.job, name.clone()), BLOB_MAX)? {
            Fetched::Blob { bytes, .. } => Ok(bytes),
            other => Err(nonsense(&name, &other)),
        }
    }
}
