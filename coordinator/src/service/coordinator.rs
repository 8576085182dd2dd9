//! Starting and stopping.

use super::client::ClientService;
use super::data::DataService;
use super::engine::{Engine, REQUESTS_MAX};
use super::fleet::FleetService;
use super::options::CoordinatorOptions;
use super::request::{EngineLine, Request};
use super::shelf::Shelf;
use super::telemetry;
use super::trouble::Trouble;
use crate::CoordinatorError;
use crate::artefacts::Artefacts;
use crate::jobs::JobFolder;
use crate::store::{Change, Store};
use halfstep_proto::wire::artefacts_server::ArtefactsServer;
use halfstep_proto::wire::client_server::ClientServer;
use halfstep_proto::wire::fleet_server::FleetServer;
use halfstep_proto::{Listener, Services};
use halfstep_work::JobId;
use std::fs;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// Calls that go on when the coordinator stops may take so long to end.
const LAST_CALLS: Duration = Duration::from_secs(2);

/// Threads that plan or write results may take so long to end.
const LAST_THREADS: Duration = Duration::from_millis(500);

/// Asks a coordinator's engine for a sign of life; clones ask the same one.
#[derive(Clone)]
pub struct Pulse(EngineLine);

impl Pulse {
    /// Whether the engine answers within `limit`. It does not while its disk stands still, nor when it has ended.
    pub async fn beats(&self, limit: Duration) -> bool {
        let asked = self.0.ask(|reply| Request::Ping { reply });
        matches!(timeout(limit, asked).await, Ok(Ok(())))
    }
}

/// A running coordinator. Dropped, it stops at once; its durable state is safe at any moment.
pub struct Coordinator {
    line: EngineLine,
    engine: JoinHandle<()>,
    servers: JoinSet<()>,
    stop: watch::Sender<bool>,
    trouble: Trouble,
    store: Weak<()>,
    epoch: u64,
    resuming: Vec<JobId>,
}

impl Coordinator {
    /// Takes the state folder, goes on with the jobs in it, answers at every listener. Runs on the tokio runtime that
    /// it is called on; blocks it while the state is opened.
    ///
    /// `health`: where grpc.health.v1 answers by itself; it answers at `listeners` too.
    ///
    /// # Errors
    /// `Store` if the folder is in use by another coordinator or damaged; `Storage`.
    pub async fn start(
        options: CoordinatorOptions,
        listeners: Vec<Listener>,
        health: Vec<Listener>,
    ) -> Result<Self, CoordinatorError> {
        fs::create_dir_all(&options.state)
            .map_err(|e| CoordinatorError::storage(&options.state, "create folder", e))?;
        let state = fs::canonicalize(&options.state)
            .map_err(|e| CoordinatorError::storage(&options.state, "find", e))?;
        let began = Instant::now();
        let store = Arc::new(Store::open(&state)?);
        if let Some(only) = options.only {
            forget_others(&store, only)?;
        }
        let (epoch, held) = (store.epoch(), store.alive());
        let artefacts = Arc::new(Artefacts::open(&state.join("artefacts"))?);
        let shelf = Shelf::default();
        let trouble = Trouble::default();
        let (sender, requests) = mpsc::channel(REQUESTS_MAX);
        let line = EngineLine::new(sender);
        let engine = Engine::new(
            store,
            Arc::clone(&artefacts),
            shelf.clone(),
            options.timing,
            line.clone(),
            trouble.clone(),
        )?
        .keeping(options.keep_jobs);
        let resuming = engine.unfinished();
        telemetry::started(epoch, began.elapsed());
        let (reporter, answers) = tonic_health::server::health_reporter();
        let fleet =
            FleetService { engine: line.clone(), artefacts: Arc::clone(&artefacts), shelf: shelf.clone() };
        let client = ClientService { engine: line.clone(), artefacts: Arc::clone(&artefacts) };
        let data = DataService::new(line.clone(), artefacts, shelf, &state, trouble.clone());
        reporter.set_serving::<FleetServer<FleetService>>().await;
        reporter.set_serving::<ClientServer<ClientService>>().await;
        reporter.set_serving::<ArtefactsServer<DataService>>().await;
        let all = Services::new()
            .with(FleetServer::new(fleet))
            .with(ClientServer::new(client))
            .with(ArtefactsServer::new(data))
            .with(answers.clone());
        let (stop, _) = watch::channel(false);
        let mut servers = JoinSet::new();
        for listener in listeners {
            servers.spawn(answer(all.clone(), listener, stop.subscribe()));
        }
        for listener in health {
            servers.spawn(answer(Services::new().with(answers.clone()), listener, stop.subscribe()));
        }
        let engine = tokio::spawn(engine.run(requests));
        Ok(Self { store: held, line, engine, servers, stop, trouble, epoch, resuming })
    }

    /// Its incarnation.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// For whoever wants to know whether it is at work.
    pub fn pulse(&self) -> Pulse {
        Pulse(self.line.clone())
    }

    /// Returns when the disk has refused something, with what it said. The job waits for space meanwhile.
    pub fn refused_by_disk(&self) -> impl Future<Output = String> + Send + 'static {
        let mut trouble = self.trouble.watch();
        async move {
            loop {
                let seen = trouble.borrow_and_update().clone();
                if let Some(what) = seen {
                    return what;
                }
                if trouble.changed().await.is_err() {
                    // It has stopped: nothing will be refused any more.
                    std::future::pending::<()>().await;
                }
            }
        }
    }

    /// Jobs that were not over when it started, in the order in which it takes them up.
    pub fn resuming(&self) -> &[JobId] {
        &self.resuming
    }

    /// Waits until it cannot go on: the engine or a listener ended by itself.
    pub async fn failed(&mut self) {
        tokio::select! {
            _ = &mut self.engine => {}
            Some(_) = self.servers.join_next() => {}
        }
    }

    /// Says farewell to nodes, ends the calls in hand, stops. At most a few seconds; what is acknowledged is durable
    /// all the time.
    pub async fn stop(mut self) {
        let (reply, stopped) = oneshot::channel();
        if self.line.tell(Request::Stop { reply }).await.is_ok() {
            // An engine that ended by itself does not answer.
            let _ = timeout(LAST_CALLS, stopped).await;
        }
        // Fails when no server is left.
        let _ = self.stop.send(true);
        let all = async { while self.servers.join_next().await.is_some() {} };
        if timeout(LAST_CALLS, all).await.is_err() {
            tracing::warn!("calls in hand did not end and are cut off");
        }
        // The state folder is free for another when this returns, unless a thread is in the middle of a large file.
        let store = self.store.clone();
        let released = async {
            while store.strong_count() > 0 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(LAST_THREADS, released).await.is_err() {
            tracing::warn!("a thread still works on the state folder");
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.servers.abort_all();
        self.engine.abort();
    }
}

/// Roundings of other jobs stay as artefacts until the folder is removed; nothing refers to them.
fn forget_others(store: &Store, only: JobId) -> Result<(), CoordinatorError> {
    let others: Vec<JobId> = store.jobs()?.iter().map(|job| job.id).filter(|id| *id != only).collect();
    let changes: Vec<Change> = others.iter().copied().map(Change::ForgetJob).collect();
    store.commit(&changes)?;
    others.into_iter().try_for_each(|job| JobFolder::new(store.folder(), job).remove())
}

async fn answer(services: Services, listener: Listener, mut stop: watch::Receiver<bool>) {
    let stopped = async move {
        // Fails when the coordinator was dropped: then it stops as well.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    if let Err(error) = services.serve(listener, stopped).await {
        tracing::error!(%error, "a listener failed");
    }
}
