//! The parts of a fleet, over any transport, and a client that asks it for a job.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use halfstep_agent::{
    CountingEngine, DaemonOptions, LocalNode, NodeCounts, NodeDaemon, NodeOptions, RtenEngine,
};
use halfstep_coordinator::dataset::DatasetOptions;
use halfstep_coordinator::jobs::{Collected, collect};
use halfstep_coordinator::service::{Coordinator, CoordinatorOptions, Timing};
use halfstep_coordinator::{CoordinatorError, EncodingsVersion, JobConfig, LanguageConfig};
use halfstep_proto::wire::client_client::ClientClient;
use halfstep_proto::{Role, Transport, hello, job_from_wire, job_to_wire, wire};
use halfstep_quant::{Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_work::{JobId, Objective, Partition, Propagation, SolverSettings, StartPoint};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

/// Between two questions of a client.
const PAUSE: Duration = Duration::from_millis(20);
/// A client asks again after this long without an answer.
const ANSWER: Duration = Duration::from_secs(2);

/// The example network, 16 shards of so many samples each.
pub(crate) fn job(samples_per_shard: usize, iterations: u32) -> Collected {
    let example =
        |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fashion-mnist").join(name);
    let solver = SolverSettings {
        objective: Objective::Gram,
        iterations,
        learning_rate: 0.01,
        beta: (20.0, 2.0),
        warm_start: 0.2,
        lambda: 0.01,
        batch: 32,
        damping: 0.01,
        start: StartPoint::Nearest,
        refine_sweeps: 2,
        scale_fits: 0,
        seed: 1,
        positions_per_shard: 16,
        positions_fraction: 1.0,
    };
    let grid = GridSpec {
        bits: 3,
        scheme: Scheme::Symmetric,
        granularity: Granularity::PerChannel,
        range: RangeEstimator::Mse,
    };
    let config = JobConfig {
        model: example("model.onnx"),
        calibration: example("calibration.npz"),
        dataset: DatasetOptions { samples: Some(16 * samples_per_shard), ..DatasetOptions::default() },
        output: PathBuf::new(),
        force: false,
        grid,
        rules: Vec::new(),
        solver,
        propagation: Propagation::Sequential,
        partition: Partition::Batches,
        shard_size: Some(samples_per_shard),
        fold_batch_norm: true,
        encodings: vec![EncodingsVersion::V1_0_0],
        language: LanguageConfig::default(),
    };
    collect(&config).unwrap()
}

/// Listens at `address`, keeps its state in the folder.
pub(crate) async fn coordinator(
    transport: &Transport,
    address: &str,
    state: &Path,
    timing: Timing,
) -> Result<Coordinator, CoordinatorError> {
    let listener = transport.listen(address).await.unwrap();
    let options = CoordinatorOptions { timing, ..CoordinatorOptions::new(state) };
    Coordinator::start(options, vec![listener], Vec::new()).await
}

/// A node of one slot that counts what runs through its network; it serves at `listen`.
pub(crate) fn node(
    name: &str,
    transport: &Transport,
    coordinator: &str,
    listen: &str,
    spill: &Path,
) -> (NodeDaemon, NodeCounts) {
    let (engine, counts) = CountingEngine::new(RtenEngine::default());
    let options = NodeOptions { threads: 1, memory_budget: 256 << 20, spill_dir: spill.into() };
    let told = DaemonOptions {
        name: name.into(),
        coordinator: coordinator.into(),
        transport: transport.clone(),
        listen: listen.into(),
        advertise: None,
    };
    (NodeDaemon::new(LocalNode::new(Box::new(engine), options), told), counts)
}

/// A client that asks until it is answered: the coordinator may be away.
pub(crate) struct Client {
    pub(crate) transport: Transport,
    pub(crate) coordinator: String,
}

impl Client {
    /// Asks, over a new connection each time, until there is an answer that is not an excuse.
    async fn ask<T>(&self, question: impl AsyncFn(ClientClient<Channel>) -> Result<T, tonic::Status>) -> T {
        loop {
            let channel = self.transport.connector(&self.coordinator, Role::Coordinator).channel();
            match timeout(ANSWER, question(ClientClient::new(channel))).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(status)) => {
                    let passing = matches!(
                        status.code(),
                        tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled
                    );
                    assert!(passing, "{status}");
                }
                Err(_) => {}
            }
            sleep(PAUSE).await;
        }
    }

    /// Hands the job over; its files are where the coordinator finds them.
    pub(crate) async fn submit(&self, job: &Collected) {
        let files = job.files.iter().map(|file| wire::InputFile {
            role: file.role.text().into(),
            name: file.name.clone(),
            size: file.size,
            hash: file.hash.as_bytes().to_vec(),
            path: file.path.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
        });
        let request =
            wire::SubmitRequest { hello: Some(hello()), spec: job.spec.clone(), files: files.collect() };
        let reply = self.ask(async |mut client| client.submit(request.clone()).await).await.into_inner();
        assert_eq!(job_from_wire(&reply.job).unwrap(), job.id);
    }

    /// How the job stands.
    pub(crate) async fn status(&self, job: JobId) -> wire::JobStatus {
        self.ask(async |mut client| client.status(request(job)).await).await.into_inner()
    }

    /// Waits until that many stages are over.
    pub(crate) async fn stages(&self, job: JobId, stages: u64) {
        while self.status(job).await.stages_done < stages {
            sleep(PAUSE / 4).await;
        }
    }

    /// Waits for the end; hashes of the results by name, but for times.
    pub(crate) async fn results(&self, job: JobId) -> BTreeMap<String, Vec<u8>> {
        loop {
            let status = self.status(job).await;
            match status.state() {
                wire::JobState::Queued | wire::JobState::Running => sleep(PAUSE).await,
                wire::JobState::Finished if status.exit == 0 => break,
                _ => panic!("{status:?}"),
            }
        }
        let reply = self.ask(async |mut client| client.results(request(job)).await).await.into_inner();
        let hashes: BTreeMap<_, _> = reply.files.into_iter().map(|file| (file.name, file.hash)).collect();
        assert!(hashes.contains_key("model.onnx"), "{hashes:?}");
        hashes.into_iter().filter(|(name, _)| name != "timing.json").collect()
    }
}

fn request(job: JobId) -> wire::JobRequest {
    wire::JobRequest { hello: Some(hello()), job: job_to_wire(job) }
}

/// Samples that ran through operators, all together.
pub(crate) fn runs(counts: &NodeCounts) -> u64 {
    counts.lock().unwrap().values().sum()
}
