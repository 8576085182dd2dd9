//! A coordinator in this process, and nodes that compute nothing but speak as nodes do.

#![allow(dead_code, reason = "each test file uses its part")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper that fails fails its test")]

use halfstep_coordinator::dataset::DatasetOptions;
use halfstep_coordinator::jobs::{Collected, collect};
use halfstep_coordinator::service::{Coordinator, CoordinatorOptions, Timing};
use halfstep_coordinator::{EncodingsVersion, JobConfig, LanguageConfig};
use halfstep_proto::data::{DataClient, Fetched, Traffic};
use halfstep_proto::wire::client_client::ClientClient;
use halfstep_proto::wire::fleet_client::FleetClient;
use halfstep_proto::wire::{self, coordinator_message::Body as Said, node_message::Body};
use halfstep_proto::{
    BlobHash, BlobName, Commit, DoneRef, Fetch, JobEvent, Role, Transport, hello, job_from_wire, job_to_wire,
    rounding,
};
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_work::{
    ChunkId, ChunkReport, Cost, Failure, FailureClass, Grant, JobId, LayerId, Lease, NodeDescription, NodeId,
    Objective, Partition, PeakRecord, Plan, Propagation, Rounding, SegmentId, SolverSettings, StartPoint,
    Task, Verdict,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Where the coordinator listens in memory.
pub(crate) const PLACE: &str = "coordinator";
/// No wait of a test is longer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fashion-mnist").join(name)
}

pub(crate) fn config(seed: u64) -> JobConfig {
    let solver = SolverSettings {
        objective: Objective::Gram,
        iterations: 0,
        learning_rate: 0.01,
        beta: (20.0, 2.0),
        warm_start: 0.2,
        lambda: 0.01,
        batch: 32,
        damping: 0.001,
        start: StartPoint::Nearest,
        refine_sweeps: 1,
        scale_fits: 0,
        seed,
        positions_per_shard: 16,
        positions_fraction: 1.0,
    };
    JobConfig {
        model: example("model.onnx"),
        calibration: example("calibration.npz"),
        dataset: DatasetOptions { samples: Some(64), ..DatasetOptions::default() },
        output: PathBuf::new(),
        force: false,
        grid: GridSpec {
            bits: 4,
            scheme: Scheme::Symmetric,
            granularity: Granularity::PerChannel,
            range: RangeEstimator::Mse,
        },
        rules: Vec::new(),
        solver,
        propagation: Propagation::Sequential,
        partition: Partition::Batches,
        shard_size: None,
        fold_batch_norm: true,
        encodings: vec![EncodingsVersion::V1_0_0],
        language: LanguageConfig::default(),
    }
}

/// A coordinator with its state folder; started again it goes on.
pub(crate) struct Bench {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) transport: Transport,
    pub(crate) timing: Timing,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let timing = Timing {
            heartbeat: Duration::from_millis(400),
            lease: Duration::from_secs(4),
            ..Timing::default()
        };
        Self { folder: tempfile::tempdir().unwrap(), transport: Transport::memory(), timing }
    }

    pub(crate) fn options(&self) -> CoordinatorOptions {
        CoordinatorOptions {
            timing: self.timing,
            ..CoordinatorOptions::new(self.folder.path().join("state"))
        }
    }

    pub(crate) async fn start(&self) -> Coordinator {
        let listener = self.transport.listen(PLACE).await.unwrap();
        Coordinator::start(self.options(), vec![listener], Vec::new()).await.unwrap()
    }

    pub(crate) fn channel(&self) -> Channel {
        self.transport.connector(PLACE, Role::Coordinator).channel()
    }

    pub(crate) fn client(&self) -> ClientClient<Channel> {
        ClientClient::new(self.channel())
    }

    pub(crate) fn data(&self) -> DataClient {
        DataClient::with_channel(self.channel(), PLACE, Traffic::default())
    }

    pub(crate) async fn submit(&self, collected: &Collected) -> Result<(JobId, bool), tonic::Status> {
        let request = wire::SubmitRequest {
            hello: Some(hello()),
            spec: collected.spec.clone(),
            files: files_to_wire(collected),
        };
        let reply = self.client().submit(request).await?.into_inner();
        Ok((job_from_wire(&reply.job).unwrap(), reply.existed))
    }

    pub(crate) async fn submit_example(&self, seed: u64) -> JobId {
        let collected = collect(&config(seed)).unwrap();
        let (job, _) = self.submit(&collected).await.unwrap();
        assert_eq!(job, collected.id);
        job
    }

    pub(crate) async fn status(&self, job: JobId) -> wire::JobStatus {
        self.client().status(request(job)).await.unwrap().into_inner()
    }

    /// Watches until the job is over.
    pub(crate) async fn events(&self, job: JobId) -> Vec<JobEvent> {
        let mut stream = self.client().watch(request(job)).await.unwrap().into_inner();
        let mut events = Vec::new();
        let all = async {
            while let Some(event) = stream.message().await.unwrap() {
                events.push(JobEvent::try_from(&event).unwrap());
            }
        };
        tokio::time::timeout(DEADLINE, all).await.expect("the job ends in time");
        events
    }

    pub(crate) async fn exit(&self, job: JobId) -> u32 {
        let events = self.events(job).await;
        match events.last() {
            Some(JobEvent::Finished { exit, .. }) => *exit,
            other => panic!("expected an end, found {other:?}"),
        }
    }

    /// Names and hashes of the results, `timing.json` left out; each is fetched and checked on the way.
    pub(crate) async fn results(&self, job: JobId) -> Vec<(String, BlobHash)> {
        let reply = self.client().results(request(job)).await.unwrap().into_inner();
        let mut results = Vec::new();
        for file in reply.files {
            let hash = BlobHash::try_from(file.hash.as_slice()).unwrap();
            let fetched =
                self.data().fetch(Fetch::new(job, BlobName::Artefact(hash)), 1 << 30).await.unwrap();
            let Fetched::Blob { bytes, .. } = fetched else { panic!("{}: {fetched:?}", file.name) };
            assert_eq!(bytes.len() as u64, file.size);
            if file.name != "timing.json" {
                results.push((file.name, hash));
            }
        }
        results
    }

    /// Waits until something is so.
    pub(crate) async fn until(&self, what: &str, mut check: impl AsyncFnMut(&Self) -> bool) {
        let wait = async {
            while !check(self).await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }
}

pub(crate) fn request(job: JobId) -> wire::JobRequest {
    wire::JobRequest { hello: Some(hello()), job: job_to_wire(job) }
}

pub(crate) fn files_to_wire(collected: &Collected) -> Vec<wire::InputFile> {
    let file = |file: &halfstep_coordinator::store::InputFile| wire::InputFile {
        role: file.role.text().into(),
        name: file.name.clone(),
        size: file.size,
        hash: file.hash.as_bytes().to_vec(),
        path: file.path.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
    };
    collected.files.iter().map(file).collect()
}

/// What a fake node is like.
#[derive(Clone)]
pub(crate) struct Kind {
    pub(crate) name: String,
    pub(crate) device: String,
    pub(crate) slots: usize,
    /// Stops answering grants after so many solved chunks, but lives on.
    pub(crate) solves_max: usize,
    /// Pause before each answer.
    pub(crate) pause: Duration,
    /// How long it takes to open a job; it says nothing meanwhile.
    pub(crate) opens_after: Duration,
    /// What its engine says to every job.
    pub(crate) cannot_open: Option<String>,
    /// What it answers when it is to measure a line; nothing, ever, without.
    pub(crate) line: Option<wire::line_measured::Result>,
    /// Where it was to measure to.
    pub(crate) measured: Arc<Mutex<Vec<String>>>,
}

impl Default for Kind {
    fn default() -> Self {
        Self {
            name: "fake".into(),
            device: "fake device".into(),
            slots: 2,
            solves_max: usize::MAX,
            pause: Duration::ZERO,
            opens_after: Duration::ZERO,
            cannot_open: None,
            line: None,
            measured: Arc::default(),
        }
    }
}

/// A node that makes results up. Dropped, its connection breaks, as if it was killed.
pub(crate) struct FakeNode {
    pub(crate) solved: Arc<AtomicUsize>,
    pub(crate) verdicts: Arc<Mutex<Vec<(Lease, Verdict)>>>,
    pub(crate) refused: Arc<Mutex<Option<String>>>,
    pub(crate) farewell: Arc<AtomicBool>,
    pub(crate) welcome: Arc<Mutex<Option<wire::Welcome>>>,
    pub(crate) said: mpsc::Sender<wire::NodeMessage>,
    task: JoinHandle<()>,
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Works {
    channel: Channel,
    data: DataClient,
    kind: Kind,
    previous: Option<(u32, u64)>,
    welcome: Arc<Mutex<Option<wire::Welcome>>>,
    node: NodeId,
    epoch: u64,
    job: Option<(JobId, Arc<Plan>)>,
    solved: Arc<AtomicUsize>,
    verdicts: Arc<Mutex<Vec<(Lease, Verdict)>>>,
}

impl FakeNode {
    pub(crate) fn attach(bench: &Bench, kind: Kind) -> Self {
        Self::attach_again(bench, kind, None)
    }

    /// `previous`: registration and incarnation of the coordinator before.
    pub(crate) fn attach_again(bench: &Bench, kind: Kind, previous: Option<(u32, u64)>) -> Self {
        let (said, messages) = mpsc::channel(64);
        let solved = Arc::new(AtomicUsize::new(0));
        let verdicts = Arc::new(Mutex::new(Vec::new()));
        let refused = Arc::new(Mutex::new(None));
        let farewell = Arc::new(AtomicBool::new(false));
        let welcome = Arc::new(Mutex::new(None));
        let works = Works {
            channel: bench.channel(),
            data: bench.data(),
            kind,
            previous,
            welcome: welcome.clone(),
            node: NodeId(0),
            epoch: 0,
            job: None,
            solved: solved.clone(),
            verdicts: verdicts.clone(),
        };
        let live = live(works, said.clone(), messages, refused.clone(), farewell.clone());
        Self { solved, verdicts, refused, farewell, welcome, said, task: tokio::spawn(live) }
    }
}

fn message(body: Body) -> wire::NodeMessage {
    wire::NodeMessage { body: Some(body) }
}

async fn live(
    mut works: Works,
    said: mpsc::Sender<wire::NodeMessage>,
    messages: mpsc::Receiver<wire::NodeMessage>,
    refused: Arc<Mutex<Option<String>>>,
    farewell: Arc<AtomicBool>,
) {
    let description = NodeDescription {
        name: works.kind.name.clone(),
        slots: works.kind.slots,
        device: works.kind.device.clone(),
        engine: "fake engine".into(),
        flops_per_second: 1e9,
        memory_bytes: 0,
        exchange: String::new(),
    };
    let attach = wire::Attach {
        hello: Some(hello()),
        description: Some((&description).into()),
        address: "nowhere:1".into(),
        previous_node: works.previous.map(|(node, _)| node),
        previous_epoch: works.previous.map_or(0, |(_, epoch)| epoch),
    };
    said.send(message(Body::Attach(attach))).await.unwrap();
    let mut fleet = FleetClient::new(works.channel.clone());
    let Ok(stream) = fleet.attach(ReceiverStream::new(messages)).await else { return };
    let mut stream = stream.into_inner();
    let mut beat = tokio::time::interval(Duration::from_millis(100));
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let next = tokio::select! {
            next = stream.message() => next,
            _ = beat.tick() => {
                let beat = wire::Heartbeat::default();
                if said.send(message(Body::Heartbeat(beat))).await.is_err() { return }
                continue;
            }
        };
        let Ok(Some(wire::CoordinatorMessage { body: Some(body) })) = next else { return };
        match body {
            Said::Welcome(welcome) => {
                (works.node, works.epoch) = (NodeId(welcome.node), welcome.epoch);
                *works.welcome.lock().unwrap() = Some(welcome);
            }
            Said::Open(open) => {
                let job = job_from_wire(&open.job).unwrap();
                works.open(job, BlobHash::try_from(open.plan.as_slice()).unwrap()).await;
                let failure = works.kind.cannot_open.clone();
                let failure = failure.map(|why| Failure::new(FailureClass::BadInput, why).into());
                tokio::time::sleep(works.kind.opens_after).await;
                let opened = wire::Opened { job: open.job, inventory: Some(Default::default()), failure };
                if said.send(message(Body::Opened(opened))).await.is_err() {
                    return;
                }
            }
            Said::Grant(grant) => {
                let grant = Grant::try_from(grant).unwrap();
                if let Some(work) = works.work(grant.lease) {
                    tasks.spawn(work);
                }
            }
            Said::Measure(asked) => {
                works.kind.measured.lock().unwrap().push(asked.address);
                let Some(result) = works.kind.line.clone() else { continue };
                let measured = wire::LineMeasured { number: asked.number, result: Some(result) };
                if said.send(message(Body::Measured(measured))).await.is_err() {
                    return;
                }
            }
            Said::Refused(why) => *refused.lock().unwrap() = Some(why.reason),
            Said::Farewell(_) => farewell.store(true, Ordering::SeqCst),
            // As if it did not know the word: who leaves waits for it in vain.
            Said::TakeOver(_) => {}
            Said::Revoke(_) | Said::DropSums(_) | Said::Close(_) | Said::Drain(_) | Said::Group(_) => {}
        }
    }
}

impl Works {
    async fn open(&mut self, job: JobId, plan: BlobHash) {
        let fetched = self.data.fetch(Fetch::new(job, BlobName::Artefact(plan)), 1 << 30).await.unwrap();
        let Fetched::Blob { bytes, .. } = fetched else { panic!("{fetched:?}") };
        let plan: Plan = serde_json::from_slice(&bytes).unwrap();
        plan.validate().unwrap();
        self.job = Some((job, Arc::new(plan)));
    }

    /// What answers a lease; none if this node has stopped working.
    fn work(&self, lease: Lease) -> Option<impl Future<Output = ()> + Send + 'static + use<>> {
        let (job, plan) = self.job.clone()?;
        if matches!(lease.task, Task::Solve { .. })
            && self.solved.fetch_add(1, Ordering::SeqCst) >= self.kind.solves_max
        {
            return None;
        }
        let (data, channel, pause) = (self.data.clone(), self.channel.clone(), self.kind.pause);
        let (node, epoch, verdicts) = (self.node, self.epoch, self.verdicts.clone());
        Some(async move {
            tokio::time::sleep(pause).await;
            let answered = answer(&data, &plan, &lease.task).await;
            let outcome = answered.map_err(|error| Failure::new(error.class, error.message));
            let cost = Cost { seconds: 0.25, ..Cost::default() };
            let (id, attempt) = (lease.id, lease.attempt);
            let commit = Commit { job, node, epoch, lease: id, attempt, outcome, cost };
            let mut fleet = FleetClient::new(channel);
            for _ in 0..100 {
                match fleet.commit(wire::CommitRequest::from(commit.clone())).await {
                    Ok(reply) => {
                        let verdict = reply.into_inner().try_into().unwrap();
                        verdicts.lock().unwrap().push((lease, verdict));
                        return;
                    }
                    Err(status) if status.code() == tonic::Code::Unavailable => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    Err(_) => return,
                }
            }
        })
    }
}

async fn answer(data: &DataClient, plan: &Plan, task: &Task) -> Result<DoneRef, halfstep_work::SourceError> {
    Ok(match task {
        Task::Forward { .. } => DoneRef::Forwarded,
        Task::Capture { segment, .. } => DoneRef::Captured { peaks: peaks(plan, *segment) },
        Task::Accumulate { .. } => DoneRef::Accumulated,
        Task::Reduce { .. } => DoneRef::Reduced,
        Task::Solve { layer, chunk } => {
            let blob = rounding::encode(&made_up(plan, *layer, *chunk)).unwrap();
            DoneRef::Solved(data.upload(blob).await?)
        }
    })
}

fn peaks(plan: &Plan, segment: SegmentId) -> Vec<PeakRecord> {
    let peak = |layer: &LayerId| PeakRecord {
        layer: *layer,
        use_index: 0,
        full_precision: 1.0,
        quantized: 1.0,
        positions: 10,
    };
    plan.stages[segment.index()].solve.iter().map(peak).collect()
}

/// The same integers for the same chunk, whoever makes them.
pub(crate) fn made_up(plan: &Plan, layer: LayerId, chunk: ChunkId) -> Rounding {
    let entry = plan.layer(layer);
    let (rows, cols) = (entry.chunks[chunk.index()].len(), entry.cols);
    let encodings = Encodings {
        bits: entry.grid.bits,
        scheme: entry.grid.scheme,
        granularity: Granularity::PerChannel,
        rows,
        cols,
        scale: vec![0.125; rows],
        zero_point: vec![0; rows],
    };
    let salt = (layer.0 + 3 * chunk.0) as usize;
    let q = (0..rows * cols).map(|i| ((i + salt) % 7) as i32 - 3).collect();
    let report = ChunkReport { objective_nearest: 2.0, objective: 1.0, signal: 4.0, ..Default::default() };
    Rounding { layer, chunk, encodings, q, report }
}
