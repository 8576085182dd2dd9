//! A coordinator that does as the test tells it: takes attachments and commits, serves a job's blobs.
//!
//! Not here: any decision.

use super::{Setup, alone};
use bytes::Bytes;
use halfstep_model::skeleton;
use halfstep_proto::data::{Blob, ReplyStream, Traffic, receive, serve};
use halfstep_proto::wire::{
    self, CoordinatorMessage, NodeMessage, artefacts_server, coordinator_message, fleet_server, node_message,
};
use halfstep_proto::{
    BlobHash, BlobName, Commit, DoneRef, Fetch, Listener, Services, Transport, hello, job_to_wire, rounding,
    tensors,
};
use halfstep_work::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub const JOB: JobId = JobId([9; 16]);
/// Nothing in a test takes longer.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

/// What is common to all incarnations of a fake.
pub struct State {
    pub setup: Setup,
    pub blobs: Mutex<BTreeMap<BlobHash, Bytes>>,
    pub roundings: Mutex<BTreeMap<(LayerId, ChunkId), BlobHash>>,
    /// Commits to be answered with `unavailable` before they are looked at.
    pub refuse_commits: AtomicU32,
    /// Uploads to be forgotten when they are first asked for.
    pub lose_blobs: AtomicU32,
    pub committed: Mutex<Vec<Commit>>,
    /// Verdict on leases other than `Accepted`.
    pub verdicts: Mutex<BTreeMap<LeaseId, Verdict>>,
    /// Names fetched.
    pub fetched: Mutex<Vec<BlobName>>,
    /// Constants whose copy the node had.
    pub same: Mutex<BTreeSet<String>>,
    attached: mpsc::UnboundedSender<Attached>,
    commits: mpsc::UnboundedSender<Commit>,
    traffic: Traffic,
}

/// One attachment.
pub struct Attached {
    pub introduction: wire::Attach,
    pub heard: mpsc::UnboundedReceiver<node_message::Body>,
    say: mpsc::Sender<Result<CoordinatorMessage, Status>>,
}

/// A way to say orders.
pub struct Speaker(mpsc::Sender<Result<CoordinatorMessage, Status>>);

impl Speaker {
    pub async fn order(&self, epoch: u64, order: GroupOrder) {
        let body = Some(coordinator_message::Body::Group((epoch, order).into()));
        self.0.send(Ok(CoordinatorMessage { body })).await.unwrap();
    }
}

/// Until the server is stopped.
pub struct Coordinator {
    pub state: Arc<State>,
    pub attachments: mpsc::UnboundedReceiver<Attached>,
    pub commits: mpsc::UnboundedReceiver<Commit>,
    pub transport: Transport,
    pub address: String,
    serving: JoinHandle<()>,
    next_lease: u64,
}

impl Coordinator {
    pub async fn new(setup: Setup, transport: Transport) -> Self {
        let (attached, attachments) = mpsc::unbounded_channel();
        let (commits_in, commits) = mpsc::unbounded_channel();
        let state = Arc::new(State {
            setup,
            blobs: Mutex::default(),
            roundings: Mutex::default(),
            refuse_commits: AtomicU32::new(0),
            lose_blobs: AtomicU32::new(0),
            committed: Mutex::default(),
            verdicts: Mutex::default(),
            fetched: Mutex::default(),
            same: Mutex::default(),
            attached,
            commits: commits_in,
            traffic: Traffic::default(),
        });
        let listener = transport.listen("").await.unwrap();
        let address = listener.address();
        let serving = serving(&state, listener);
        Self { state, attachments, commits, transport, address, serving, next_lease: 1 << 32 }
    }

    /// Every connection breaks, nobody answers.
    pub async fn stop(&mut self) {
        self.serving.abort();
        let _ = (&mut self.serving).await;
    }

    pub async fn restart(&mut self) {
        let listener = self.transport.listen(&self.address).await.unwrap();
        self.serving = serving(&self.state, listener);
    }

    pub fn plan(&self) -> Arc<Plan> {
        Arc::clone(&self.state.setup.plan)
    }

    pub fn open_job(&self, model_path: &str) -> coordinator_message::Body {
        let plan = Bytes::from(serde_json::to_vec(self.plan().as_ref()).unwrap());
        let hash = BlobHash::of(&plan);
        self.state.blobs.lock().unwrap().insert(hash, plan);
        coordinator_message::Body::Open(wire::OpenJob {
            job: job_to_wire(JOB),
            plan: hash.to_vec(),
            model_path: model_path.into(),
            fold_batch_norm: false,
        })
    }

    pub fn lease(&mut self, node: u32, task: Task) -> Lease {
        self.next_lease += 1;
        Lease { id: LeaseId(self.next_lease), node: NodeId(node), attempt: 1, task }
    }

    /// The next attachment, welcomed.
    pub async fn welcome(&mut self, node: u32, epoch: u64, fenced: bool) -> Attached {
        let attached = soon("attachment", self.attachments.recv()).await.unwrap();
        let welcome =
            wire::Welcome { hello: Some(hello()), node, epoch, heartbeat_ms: 20, lease_ms: 10_000, fenced };
        attached.say(coordinator_message::Body::Welcome(welcome)).await;
        attached
    }

    /// Welcomed, and the job opened.
    pub async fn take_in(&mut self, node: u32, epoch: u64) -> (Attached, Inventory) {
        let mut attached = self.welcome(node, epoch, false).await;
        attached.say(self.open_job("")).await;
        let opened = attached.opened().await;
        assert_eq!(opened.failure, None);
        (attached, opened.inventory.unwrap().try_into().unwrap())
    }

    /// The next outcome that a node has an answer to.
    pub async fn outcome(&mut self) -> Commit {
        soon("commit", self.commits.recv()).await.unwrap()
    }

    pub fn rounding(&self, hash: BlobHash) -> Rounding {
        rounding::decode(&self.state.blobs.lock().unwrap()[&hash]).unwrap()
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Attached {
    pub async fn say(&self, body: coordinator_message::Body) {
        self.say.send(Ok(CoordinatorMessage { body: Some(body) })).await.unwrap();
    }

    /// A message of a kind that the node does not know.
    pub async fn say_something_new(&self) {
        self.say.send(Ok(CoordinatorMessage { body: None })).await.unwrap();
    }

    pub async fn grant(&self, lease: Lease, holdings: Vec<Holding>) {
        self.say(coordinator_message::Body::Grant((JOB, &Grant { lease, holdings }).into())).await;
    }

    pub async fn order(&self, epoch: u64, order: GroupOrder) {
        self.speaker().order(epoch, order).await;
    }

    /// Says orders from elsewhere.
    pub fn speaker(&self) -> Speaker {
        Speaker(self.say.clone())
    }

    /// The next answer of a group of this epoch; those of groups before are passed over.
    pub async fn answer(&mut self, epoch: u64) -> GroupAnswer {
        let answer = |body| match body {
            node_message::Body::Group(answer) => Some(answer),
            _ => None,
        };
        loop {
            let answer = self.hears("answer of a group", answer).await;
            let (of, answer) = <(u64, GroupAnswer)>::try_from(answer).unwrap();
            assert!(of <= epoch, "{answer:?}");
            if of == epoch {
                return answer;
            }
        }
    }

    /// The next message that `pick` wants; others are passed over.
    pub async fn hears<T>(&mut self, what: &str, mut pick: impl FnMut(node_message::Body) -> Option<T>) -> T {
        soon(what, async {
            loop {
                let body = self.heard.recv().await.unwrap_or_else(|| panic!("{what}: the stream ended"));
                if let Some(found) = pick(body) {
                    return found;
                }
            }
        })
        .await
    }

    pub async fn opened(&mut self) -> wire::Opened {
        let opened = |body| match body {
            node_message::Body::Opened(opened) => Some(opened),
            _ => None,
        };
        self.hears("opened", opened).await
    }

    pub async fn heartbeat(&mut self) -> wire::Heartbeat {
        let beat = |body| match body {
            node_message::Body::Heartbeat(beat) => Some(beat),
            _ => None,
        };
        self.hears("heartbeat", beat).await
    }
}

fn serving(state: &Arc<State>, listener: Listener) -> JoinHandle<()> {
    let services = Services::new()
        .with(fleet_server::FleetServer::new(Handlers(Arc::clone(state))))
        .with(artefacts_server::ArtefactsServer::new(Handlers(Arc::clone(state))));
    tokio::spawn(async move {
        services.serve(listener, std::future::pending()).await.unwrap();
    })
}

#[derive(Clone)]
struct Handlers(Arc<State>);

#[tonic::async_trait]
impl fleet_server::Fleet for Handlers {
    type AttachStream = ReceiverStream<Result<CoordinatorMessage, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<NodeMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut said = request.into_inner();
        let first = said.message().await?.and_then(|message| message.body);
        let Some(node_message::Body::Attach(introduction)) = first else {
            return Err(Status::invalid_argument("no introduction"));
        };
        let (say, saying) = mpsc::channel(64);
        let (heard_in, heard) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = said.next().await {
                let _ = heard_in.send(message.body.unwrap());
            }
        });
        self.0.attached.send(Attached { introduction, heard, say }).unwrap();
        Ok(Response::new(ReceiverStream::new(saying)))
    }

    async fn commit(
        &self,
        request: Request<wire::CommitRequest>,
    ) -> Result<Response<wire::CommitReply>, Status> {
        let refused = |left: u32| left.checked_sub(1);
        let lost = || self.0.lose_blobs.fetch_update(Ordering::SeqCst, Ordering::SeqCst, refused).is_ok();
        if self.0.refuse_commits.fetch_update(Ordering::SeqCst, Ordering::SeqCst, refused).is_ok() {
            return Err(Status::unavailable("not now"));
        }
        let commit = Commit::try_from(request.into_inner())?;
        let verdict =
            self.0.verdicts.lock().unwrap().get(&commit.lease).copied().unwrap_or(Verdict::Accepted);
        if let (Ok(DoneRef::Solved(hash)), Verdict::Accepted) = (&commit.outcome, verdict) {
            if lost() {
                self.0.blobs.lock().unwrap().remove(hash);
            }
            let blob = self.0.blobs.lock().unwrap().get(hash).cloned();
            let blob = blob.ok_or_else(|| Status::not_found("no such artefact"))?;
            let done = rounding::decode(&blob)?;
            self.0.roundings.lock().unwrap().insert((done.layer, done.chunk), *hash);
        }
        self.0.committed.lock().unwrap().push(commit.clone());
        let _ = self.0.commits.send(commit);
        Ok(Response::new(verdict.into()))
    }
}

#[tonic::async_trait]
impl artefacts_server::Artefacts for Handlers {
    type FetchStream = ReplyStream;

    async fn fetch(&self, request: Request<wire::FetchRequest>) -> Result<Response<ReplyStream>, Status> {
        let fetch = Fetch::asked(&request)?;
        self.0.fetched.lock().unwrap().push(fetch.name.clone());
        let setup = &self.0.setup;
        let stored = |hash: &BlobHash| {
            let bytes = self.0.blobs.lock().unwrap().get(hash).cloned();
            bytes.map(Blob::new).ok_or_else(|| Status::not_found("no such artefact"))
        };
        let blob = match &fetch.name {
            BlobName::Artefact(hash) => stored(hash)?,
            BlobName::Program => Blob::new(skeleton(&setup.model)),
            BlobName::Constant(name) => {
                let constant = setup.constant(name).map_err(|e| Status::not_found(e.message))?;
                let blob = tensors::encode(&[constant]).unwrap();
                if fetch.have == Some(BlobHash::of(&blob)) {
                    self.0.same.lock().unwrap().insert(name.clone());
                }
                Blob::new(blob)
            }
            BlobName::Inputs(shard) => Blob::new(tensors::encode(&setup.inputs[shard.index()]).unwrap()),
            BlobName::Rounding { layer, chunk } => {
                let hash = self.0.roundings.lock().unwrap().get(&(*layer, *chunk)).copied();
                stored(&hash.ok_or_else(|| Status::not_found("not committed"))?)?
            }
            BlobName::Held(_) | BlobName::Probe(_) => {
                return Err(Status::not_found("a coordinator holds nothing"));
            }
        };
        Ok(Response::new(serve(blob, &fetch, &self.0.traffic)?))
    }

    async fn upload(
        &self,
        request: Request<Streaming<wire::UploadRequest>>,
    ) -> Result<Response<wire::UploadReply>, Status> {
        let (hash, bytes) = receive(request.into_inner(), 1 << 30, Vec::new(), &self.0.traffic).await?;
        self.0.blobs.lock().unwrap().insert(hash, bytes.into());
        Ok(Response::new(wire::UploadReply { hash: hash.to_vec() }))
    }
}

/// What one undisturbed node makes of a setup, by the plain loop.
pub fn expected(setup: Setup) -> BTreeMap<(LayerId, ChunkId), Rounding> {
    alone(setup).into_iter().map(|(key, rounding)| (key, rounding.as_ref().clone())).collect()
}
