//! For tests: services that answer without doing anything, and places to serve them.

use crate::data::{Blob, ReplyStream, Traffic, probe, receive, serve};
use crate::wire::{self, artefacts_server, client_server, fleet_server};
use crate::{BlobHash, BlobName, Connector, Fetch, Listener, Role, Services, Transport};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::{Empty, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Answers every call; keeps blobs in memory.
#[derive(Clone, Default)]
pub(crate) struct Fake {
    pub(crate) blobs: Arc<Mutex<BTreeMap<BlobHash, Bytes>>>,
    pub(crate) traffic: Traffic,
    pub(crate) requests: Arc<Mutex<Vec<wire::FetchRequest>>>,
}

/// Largest upload it takes.
pub(crate) const UPLOAD_MAX: u64 = 16 << 20;

impl Fake {
    pub(crate) fn services(&self) -> Services {
        Services::new()
            .with(artefacts_server::ArtefactsServer::new(self.clone()))
            .with(client_server::ClientServer::new(self.clone()))
            .with(fleet_server::FleetServer::new(self.clone()))
    }

    pub(crate) fn keep(&self, bytes: Bytes) -> BlobHash {
        let hash = BlobHash::of(&bytes);
        self.blobs.lock().unwrap().insert(hash, bytes);
        hash
    }
}

/// A server that stops when dropped.
pub(crate) struct Served {
    pub(crate) address: String,
    _stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) fn serve_at(listener: Listener, services: Services) -> Served {
    let address = listener.address();
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let stopped = async {
            let _ = stopped.await;
        };
        services.serve(listener, stopped).await.unwrap();
    });
    Served { address, _stop: stop, task }
}

/// Serves `fake` on a free address.
pub(crate) async fn start(transport: &Transport, address: &str, fake: &Fake) -> (Served, Connector) {
    let served = serve_at(transport.listen(address).await.unwrap(), fake.services());
    let connector = transport.connector(&served.address, Role::Coordinator);
    (served, connector)
}

#[tonic::async_trait]
impl artefacts_server::Artefacts for Fake {
    type FetchStream = ReplyStream;

    async fn fetch(&self, request: Request<wire::FetchRequest>) -> Result<Response<ReplyStream>, Status> {
        self.requests.lock().unwrap().push(request.get_ref().clone());
        let fetch = Fetch::asked(&request)?;
        let blob = match &fetch.name {
            BlobName::Artefact(hash) => {
                let bytes = self.blobs.lock().unwrap().get(hash).cloned();
                Blob::new(bytes.ok_or_else(|| Status::not_found(format!("blob {hash} is not here")))?)
            }
            BlobName::Probe(bytes) => probe(*bytes),
            _ => Blob::None,
        };
        Ok(Response::new(serve(blob, &fetch, &self.traffic)?))
    }

    async fn upload(
        &self,
        request: Request<Streaming<wire::UploadRequest>>,
    ) -> Result<Response<wire::UploadReply>, Status> {
        let (hash, bytes) = receive(request.into_inner(), UPLOAD_MAX, Vec::new(), &self.traffic).await?;
        self.blobs.lock().unwrap().insert(hash, bytes.into());
        Ok(Response::new(wire::UploadReply { hash: hash.to_vec() }))
    }
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl client_server::Client for Fake {
    type WatchStream = Empty<Result<wire::WatchEvent, Status>>;

    async fn offer(&self, _: Request<wire::OfferRequest>) -> Reply<wire::OfferReply> {
        Ok(Response::new(Default::default()))
    }

    async fn submit(&self, request: Request<wire::SubmitRequest>) -> Reply<wire::SubmitReply> {
        let job = request.into_inner().spec.into_iter().take(16).collect();
        Ok(Response::new(wire::SubmitReply { job, existed: false }))
    }

    async fn list(&self, _: Request<wire::ListRequest>) -> Reply<wire::ListReply> {
        Ok(Response::new(Default::default()))
    }

    async fn status(&self, _: Request<wire::JobRequest>) -> Reply<wire::JobStatus> {
        Ok(Response::new(Default::default()))
    }

    async fn watch(&self, _: Request<wire::JobRequest>) -> Reply<Self::WatchStream> {
        Ok(Response::new(tokio_stream::empty()))
    }

    async fn cancel(&self, _: Request<wire::JobRequest>) -> Reply<wire::JobStatus> {
        Ok(Response::new(Default::default()))
    }

    async fn forget(&self, _: Request<wire::JobRequest>) -> Reply<wire::ForgetReply> {
        Ok(Response::new(Default::default()))
    }

    async fn results(&self, _: Request<wire::JobRequest>) -> Reply<wire::ResultsReply> {
        Ok(Response::new(Default::default()))
    }

    async fn nodes(&self, _: Request<wire::NodesRequest>) -> Reply<wire::NodesReply> {
        Ok(Response::new(Default::default()))
    }

    async fn explain(&self, _: Request<wire::ExplainRequest>) -> Reply<wire::ExplainReply> {
        Ok(Response::new(Default::default()))
    }

    async fn drain(&self, _: Request<wire::DrainRequest>) -> Reply<wire::DrainReply> {
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl fleet_server::Fleet for Fake {
    type AttachStream = Empty<Result<wire::CoordinatorMessage, Status>>;

    async fn attach(&self, request: Request<Streaming<wire::NodeMessage>>) -> Reply<Self::AttachStream> {
        let mut messages = request.into_inner();
        while let Some(message) = messages.next().await {
            message?;
        }
        Ok(Response::new(tokio_stream::empty()))
    }

    async fn commit(&self, _: Request<wire::CommitRequest>) -> Reply<wire::CommitReply> {
        Ok(Response::new(Default::default()))
    }
}
