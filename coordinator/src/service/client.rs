//! The service that people's tools speak to.

use super::log::Subscription;
use super::request::{EngineLine, NewJob, Request as Ask};
use crate::artefacts::Artefacts;
use crate::jobs::{JobSpec, check_files, job_id, missing};
use crate::store::{FileRole, InputFile};
use halfstep_proto::wire::client_server::Client;
use halfstep_proto::wire::{self, WatchEvent};
use halfstep_proto::{BlobHash, JobEvent, check_hello, hello, job_from_wire, job_to_wire};
use halfstep_work::JobId;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Bytes of a path in a submitted job.
const PATH_MAX: usize = 4096;
/// Files of one job: what fits into a message.
const FILES_MAX: usize = 1 << 16;
/// Events of a watcher between the log and its connection.
const WATCH_BUFFER: usize = 16;

pub(super) struct ClientService {
    pub(super) engine: EngineLine,
    pub(super) artefacts: Arc<Artefacts>,
}

#[tonic::async_trait]
impl Client for ClientService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchEvent, Status>> + Send>>;

    async fn offer(
        &self,
        request: Request<wire::OfferRequest>,
    ) -> Result<Response<wire::OfferReply>, Status> {
        let offer = request.into_inner();
        check_hello(&offer.hello, "the client")?;
        let missing = self.missing(files_from_wire(offer.files)?).await?;
        let missing = missing.into_iter().map(|file| file.hash.as_bytes().to_vec()).collect();
        Ok(Response::new(wire::OfferReply { hello: Some(hello()), missing }))
    }

    async fn submit(
        &self,
        request: Request<wire::SubmitRequest>,
    ) -> Result<Response<wire::SubmitReply>, Status> {
        let submit = request.into_inner();
        check_hello(&submit.hello, "the client")?;
        let files = files_from_wire(submit.files)?;
        let refuse = |e: crate::CoordinatorError| Status::invalid_argument(e.to_string());
        let spec = JobSpec::from_json(&submit.spec).map_err(refuse)?;
        check_files(&spec, &files).map_err(refuse)?;
        // The id is of the bytes as we would write them: two ways of saying the same are the same job.
        let spec = spec.to_json().map_err(refuse)?;
        let id = job_id(&spec, &files);
        if let Some(file) = self.missing(files.clone()).await?.first() {
            let name = &file.name;
            return Err(Status::failed_precondition(format!(
                "input `{name}`: upload it first, it is not here"
            )));
        }
        let new = NewJob { id, spec, files };
        let existed = self.engine.ask(|reply| Ask::Submit { new, reply }).await?;
        Ok(Response::new(wire::SubmitReply { job: job_to_wire(id), existed }))
    }

    async fn list(&self, request: Request<wire::ListRequest>) -> Result<Response<wire::ListReply>, Status> {
        check_hello(&request.into_inner().hello, "the client")?;
        let jobs = self.engine.ask(|reply| Ask::List { reply }).await?;
        Ok(Response::new(wire::ListReply { jobs }))
    }

    async fn status(&self, request: Request<wire::JobRequest>) -> Result<Response<wire::JobStatus>, Status> {
        let job = job_of(request)?;
        Ok(Response::new(self.engine.ask(|reply| Ask::Status { job, reply }).await?))
    }

    async fn watch(&self, request: Request<wire::JobRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let job = job_of(request)?;
        let subscription = self.engine.ask(|reply| Ask::Watch { job, reply }).await?;
        let (sender, receiver) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(follow(subscription, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel(&self, request: Request<wire::JobRequest>) -> Result<Response<wire::JobStatus>, Status> {
        let job = job_of(request)?;
        Ok(Response::new(self.engine.ask(|reply| Ask::Cancel { job, reply }).await?))
    }

    async fn forget(
        &self,
        request: Request<wire::JobRequest>,
    ) -> Result<Response<wire::ForgetReply>, Status> {
        let job = job_of(request)?;
        let bytes_freed = self.engine.ask(|reply| Ask::Forget { job, reply }).await?;
        Ok(Response::new(wire::ForgetReply { bytes_freed }))
    }

    async fn results(
        &self,
        request: Request<wire::JobRequest>,
    ) -> Result<Response<wire::ResultsReply>, Status> {
        let job = job_of(request)?;
        let files = self.engine.ask(|reply| Ask::Results { job, reply }).await?;
        let files = files.into_iter().map(|file| wire::ResultFile {
            name: file.name,
            size: file.size,
            hash: file.hash.as_bytes().to_vec(),
        });
        Ok(Response::new(wire::ResultsReply { files: files.collect() }))
    }

    async fn nodes(
        &self,
        request: Request<wire::NodesRequest>,
    ) -> Result<Response<wire::NodesReply>, Status> {
        let wire::NodesRequest { hello, measure } = request.into_inner();
        check_hello(&hello, "the client")?;
        Ok(Response::new(self.engine.ask(|reply| Ask::Nodes { measure, reply }).await?))
    }

    async fn explain(
        &self,
        request: Request<wire::ExplainRequest>,
    ) -> Result<Response<wire::ExplainReply>, Status> {
        let wire::ExplainRequest { hello, job, task } = request.into_inner();
        check_hello(&hello, "the client")?;
        let job = job_from_wire(&job)?;
        Ok(Response::new(self.engine.ask(|reply| Ask::Explain { job, task, reply }).await?))
    }

    async fn drain(
        &self,
        request: Request<wire::DrainRequest>,
    ) -> Result<Response<wire::DrainReply>, Status> {
        let wire::DrainRequest { hello, node } = request.into_inner();
        check_hello(&hello, "the client")?;
        Ok(Response::new(self.engine.ask(|reply| Ask::AskToLeave { node, reply }).await?))
    }
}

impl ClientService {
    /// Hashes whatever lies where the client has it, on a thread that may wait.
    async fn missing(&self, files: Vec<InputFile>) -> Result<Vec<InputFile>, Status> {
        let artefacts = Arc::clone(&self.artefacts);
        let look = move || {
            let by_hash: BTreeMap<[u8; 32], &InputFile> =
                missing(&artefacts, &files).into_iter().map(|file| (*file.hash.as_bytes(), file)).collect();
            by_hash.into_values().cloned().collect()
        };
        tokio::task::spawn_blocking(look)
            .await
            .map_err(|e| Status::internal(format!("looking for files: {e}")))
    }
}

fn job_of(request: Request<wire::JobRequest>) -> Result<JobId, Status> {
    let request = request.into_inner();
    check_hello(&request.hello, "the client")?;
    Ok(job_from_wire(&request.job)?)
}

fn files_from_wire(files: Vec<wire::InputFile>) -> Result<Vec<InputFile>, Status> {
    if files.len() > FILES_MAX {
        let found = files.len();
        return Err(Status::invalid_argument(format!(
            "job: expected at most {FILES_MAX} files, found {found}"
        )));
    }
    files.into_iter().map(file_from_wire).collect()
}

fn file_from_wire(file: wire::InputFile) -> Result<InputFile, Status> {
    let wrong =
        |what: String| Status::invalid_argument(format!("file `{}`: {what}", file.name.escape_debug()));
    let role = FileRole::parse(&file.role).ok_or_else(|| wrong("its role is unknown".into()))?;
    if file.path.len() > PATH_MAX {
        return Err(wrong(format!("its path has {} bytes, expected at most {PATH_MAX}", file.path.len())));
    }
    let hash = BlobHash::try_from(file.hash.as_slice())?;
    let path = (!file.path.is_empty()).then(|| PathBuf::from(&file.path));
    Ok(InputFile { role, hash: blake3::Hash::from_bytes(hash.0), size: file.size, path, name: file.name })
}

/// Passes events on until the job is over or the watcher goes away.
async fn follow(subscription: Subscription, sender: mpsc::Sender<Result<WatchEvent, Status>>) {
    let Subscription { history, mut live } = subscription;
    for event in history {
        if pass_on(&sender, &event).await {
            return;
        }
    }
    loop {
        let next = tokio::select! {
            next = live.recv() => next,
            () = sender.closed() => return,
        };
        match next {
            Ok(event) => {
                if pass_on(&sender, &event).await {
                    return;
                }
            }
            Err(RecvError::Closed) => return,
            Err(RecvError::Lagged(missed)) => {
                let why = format!("too slow, {missed} events behind: watch again");
                // Fails if the watcher went away.
                let _ = sender.send(Err(Status::aborted(why))).await;
                return;
            }
        }
    }
}

/// Whether that was the end.
async fn pass_on(sender: &mpsc::Sender<Result<WatchEvent, Status>>, event: &JobEvent) -> bool {
    let message = WatchEvent::try_from(event).map_err(Status::from);
    let over = matches!(event, JobEvent::Finished { .. });
    sender.send(message).await.is_err() || over
}
