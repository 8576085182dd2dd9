//! The node's stream over a simulated network that cuts, holds and delays, and a coordinator whose host crashes (turmoil).
//!
//! Coordinator and nodes are the real ones, with the real network's times: what is simulated is the network and the clock. A
//! seed fixes how long each message takes and which faults come when. Nodes compute on threads of their own, in real time:
//! which task a fault meets differs from run to run, and one that waits for the network when its history is over panics in its
//! thread, since the clock it waited by is gone: printed, of no account. Asserted of every history: the job ends with the bytes of an
//! undisturbed one, and no rounding that was durable is committed again.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use halfstep_agent::Drain;
use halfstep_coordinator::jobs::Collected;
use halfstep_coordinator::service::Timing;
use halfstep_proto::transport::{Accept, Accepted, BoxIo, Network};
use halfstep_proto::{Security, Transport, TransportError};
use tonic::codegen::BoxFuture;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use turmoil::net::{TcpListener, TcpStream};
use turmoil::{Builder, Sim};

use crate::crew::{Client, coordinator, job, node};

const COORDINATOR: &str = "coordinator:7421";
const NODES: [&str; 2] = ["a", "b"];
/// Simulated time of a step, and the real time after it: nodes compute meanwhile.
const STEP: Duration = Duration::from_millis(10);
const COMPUTE: Duration = Duration::from_micros(300);
/// No fault before this: nodes are about to take the job up.
const ATTACHED_MS: u64 = 300;

/// After this long without progress a task counts as hung. Ten times what pings take to find a dead connection.
const HUNG_MS: u64 = 400_000;

/// TCP of the simulation.
struct Simulated;

impl Network for Simulated {
    fn connect(&self, address: String) -> BoxFuture<BoxIo, TransportError> {
        Box::pin(async move {
            let failed = |error: std::io::Error| TransportError::Connect {
                address: address.clone(),
                message: error.to_string(),
            };
            Ok(Box::new(TcpStream::connect(address.clone()).await.map_err(failed)?) as BoxIo)
        })
    }

    fn listen(&self, address: String) -> BoxFuture<Box<dyn Accept>, TransportError> {
        Box::pin(async move {
            let port = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(0);
            let bound = TcpListener::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)).await;
            let failed = |source| TransportError::Listen { address: address.clone(), source };
            Ok(Box::new(Bound(bound.map_err(failed)?, address.clone())) as Box<dyn Accept>)
        })
    }
}

struct Bound(TcpListener, String);

impl Accept for Bound {
    fn accept(&mut self) -> Accepted<'_> {
        Box::pin(async {
            let (stream, from) = self.0.accept().await?;
            Ok((Box::new(stream) as BoxIo, from.ip().to_string()))
        })
    }

    fn address(&self) -> String {
        self.1.clone()
    }
}

/// What happens to a history.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Between a node and the coordinator nothing comes through, either way.
    Cut(&'static str),
    /// The coordinator hears nothing of a node, which hears it.
    Mute(&'static str),
    /// What is sent between them arrives late.
    Hold(&'static str),
    /// The coordinator's host goes down; what is on its disk stays.
    Crash,
}

/// After how many committed roundings (of 22) it begins, how many milliseconds of simulated time it lasts. By progress and not
/// by time: how far a job is after a second of simulated time is the machine's affair.
type Scheduled = (usize, u64, Fault);

/// How often a coordinator of a simulation called each rounding committed. All of a simulation runs on one thread.
type Committed = BTreeMap<(u64, u64), u32>;

thread_local! {
    static COMMITTED: RefCell<Committed> = const { RefCell::new(BTreeMap::new()) };
}

/// Reads the log. For the whole process: what is recorded must not depend on which test comes by a place in the code first.
struct Reader;

fn read_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Reader);
        tracing::subscriber::set_global_default(subscriber).unwrap();
    });
    COMMITTED.take();
}

#[derive(Default)]
struct Fields {
    committed: bool,
    layer: Option<u64>,
    chunk: Option<u64>,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "layer" => self.layer = Some(value),
            "chunk" => self.chunk = Some(value),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.committed |= field.name() == "message" && format!("{value:?}") == "rounding committed";
    }
}

impl<S: tracing::Subscriber> Layer<S> for Reader {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        if let (true, Some(layer), Some(chunk)) = (fields.committed, fields.layer, fields.chunk) {
            COMMITTED.with_borrow_mut(|all| *all.entry((layer, chunk)).or_default() += 1);
        }
    }
}

type Results = BTreeMap<String, Vec<u8>>;

struct History {
    sim: Sim<'static>,
    results: Arc<Mutex<Option<Results>>>,
}

/// A coordinator, two nodes and a client that waits for the job.
fn history(seed: u64, job: &Collected, folder: &std::path::Path) -> History {
    let mut builder = Builder::new();
    builder.tick_duration(STEP).simulation_duration(Duration::from_secs(1200)).rng_seed(seed);
    builder.tcp_capacity(1 << 16).min_message_latency(Duration::from_millis(1));
    let mut sim = builder.max_message_latency(Duration::from_millis(40)).build();
    let transport = Transport::over(Simulated, Security::Plaintext);
    let timing =
        Timing { heartbeat: Duration::from_millis(200), lease: Duration::from_secs(2), ..Timing::default() };
    let (state, net): (PathBuf, _) = (folder.join("state"), transport.clone());
    sim.host("coordinator", move || {
        let (state, net) = (state.clone(), net.clone());
        async move {
            let _running = coordinator(&net, COORDINATOR, &state, timing).await?;
            std::future::pending().await
        }
    });
    for name in NODES {
        let (net, spill) = (transport.clone(), folder.to_path_buf());
        sim.host(name, move || {
            let (daemon, _) = node(name, &net, COORDINATOR, &format!("{name}:7422"), &spill);
            async move { Ok(daemon.run(Drain::new(), |_| {}).await?) }
        });
    }
    let results = Arc::new(Mutex::new(None));
    let (job, told) = (job.clone(), results.clone());
    sim.client("client", async move {
        let client = Client { transport, coordinator: COORDINATOR.into() };
        client.submit(&job).await;
        *told.lock().unwrap() = Some(client.results(job.id).await);
        Ok(())
    });
    History { sim, results }
}

fn begin(sim: &mut Sim<'static>, fault: Fault) {
    match fault {
        Fault::Cut(node) => sim.partition(node, "coordinator"),
        Fault::Mute(node) => sim.partition_oneway(node, "coordinator"),
        Fault::Hold(node) => sim.hold(node, "coordinator"),
        Fault::Crash => sim.crash("coordinator"),
    }
}

fn end(sim: &mut Sim<'static>, fault: Fault) {
    match fault {
        Fault::Cut(node) => sim.repair(node, "coordinator"),
        Fault::Mute(node) => sim.repair_oneway(node, "coordinator"),
        Fault::Hold(node) => sim.release(node, "coordinator"),
        Fault::Crash => sim.bounce("coordinator"),
    }
}

/// Runs a history to its end; simulated milliseconds. One fault at a time.
fn run(mut sim: Sim<'static>, faults: &[Scheduled]) -> u64 {
    let (mut coming, mut under_way) = (faults.iter(), None::<(u64, Fault)>);
    loop {
        let now = sim.elapsed().as_millis() as u64;
        if let Some((_, fault)) = under_way.take_if(|(until, _)| *until <= now) {
            end(&mut sim, fault);
        }
        if let Some((after, long, fault)) = coming.as_slice().first()
            && under_way.is_none()
            && now >= ATTACHED_MS
            && COMMITTED.with_borrow(|all| all.len() >= *after)
        {
            begin(&mut sim, *fault);
            under_way = Some((now + long, *fault));
            coming.next();
        }
        if sim.step().unwrap() {
            let never = coming.as_slice();
            assert!(never.is_empty(), "the job was over before {never:?}");
            return now;
        }
        std::thread::sleep(COMPUTE);
    }
}

fn check(seed: u64, faults: &[Scheduled]) {
    let (folder, job) = (tempfile::tempdir().unwrap(), job(2, 0));
    read_log();
    let History { sim, results } = history(seed, &job, folder.path());
    let took = run(sim, faults);
    let committed = COMMITTED.take();
    let results = results.lock().unwrap().take().unwrap();
    let expected = undisturbed(&job);
    assert!(results == expected, "seed {seed}: other results: {results:?}, expected {expected:?}");
    let twice: Vec<_> = committed.iter().filter(|(_, times)| **times > 1).collect();
    assert!(twice.is_empty(), "seed {seed}: durable and yet committed again: {twice:?}");
    assert!(committed.len() > 10, "the log was read: {committed:?}");
    // A lease in nobody's hands holds a job up until it counts as hung.
    assert!(took < HUNG_MS, "seed {seed}: it stood still, {took} ms of simulated time");
    eprintln!("seed {seed}: {took} ms simulated, {} roundings, {faults:?}", committed.len());
}

/// The same job on one node, over memory.
fn undisturbed(job: &Collected) -> Results {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let (folder, transport) = (tempfile::tempdir().unwrap(), Transport::memory());
        let state = folder.path().join("state");
        let coordinator = coordinator(&transport, "c", &state, Timing::default()).await.unwrap();
        let (daemon, _) = node("alone", &transport, "c", "", folder.path());
        let daemon = tokio::spawn(daemon.run(Drain::new(), |_| {}));
        let client = Client { transport, coordinator: "c".into() };
        client.submit(job).await;
        let results = client.results(job.id).await;
        daemon.abort();
        coordinator.stop().await;
        results
    })
}

#[test]
fn a_cut_longer_than_the_lease_and_one_shorter() {
    check(1, &[(0, 5_000, Fault::Cut("a")), (8, 900, Fault::Cut("b"))]);
}

#[test]
fn a_node_that_is_not_heard_and_messages_that_come_late() {
    check(2, &[(0, 4_000, Fault::Mute("a")), (6, 1_500, Fault::Hold("b")), (12, 3_500, Fault::Hold("a"))]);
}

#[test]
fn a_coordinator_whose_host_crashes_three_times() {
    check(3, &[(0, 1_000, Fault::Crash), (5, 300, Fault::Crash), (12, 4_000, Fault::Crash)]);
}

#[test]
fn everything_at_random() {
    for seed in 10..14u64 {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut next = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let faults = [0, 4, 8, 12].map(|at| {
            let node = NODES[next(2) as usize];
            let kinds = [Fault::Cut(node), Fault::Mute(node), Fault::Hold(node), Fault::Crash];
            let kind = kinds[next(4) as usize];
            (at + next(3) as usize, 100 + next(3_500), kind)
        });
        check(seed, &faults);
    }
}
