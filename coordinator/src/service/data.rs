//! The coordinator's data plane: blobs of the running job, artefacts, results; uploads.
//!
//! Files are sent as they are read; blobs that have to be made are made a few at a time on threads that may wait.

use super::request::{EngineLine, Request as Ask};
use super::shelf::Shelf;
use super::trouble::Trouble;
use crate::JobSource;
use crate::artefacts::{ArtefactError, Artefacts};
use crate::jobs::JobFolder;
use crate::source::ROUNDING_BYTES_MAX;
use halfstep_proto::data::{Blob, ReplyStream, Traffic, receive, serve, status_of};
use halfstep_proto::wire::artefacts_server::Artefacts as Service;
use halfstep_proto::wire::{FetchRequest, UploadReply, UploadRequest};
use halfstep_proto::{BlobHash, BlobName, Fetch, Peer, Role};
use halfstep_work::{JobId, SourceError};
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};

/// Blobs that are made at the same time.
const MAKING_MAX: usize = 4;
/// Uploads received at the same time; more wait.
const UPLOADS_MAX: usize = 16;
/// Bytes of an uploaded input file.
const INPUT_BYTES_MAX: u64 = 1 << 40;

pub(super) struct DataService {
    pub(super) engine: EngineLine,
    pub(super) artefacts: Arc<Artefacts>,
    pub(super) shelf: Shelf,
    pub(super) state: PathBuf,
    pub(super) traffic: Traffic,
    making: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    trouble: Trouble,
}

impl DataService {
    pub(super) fn new(
        engine: EngineLine,
        artefacts: Arc<Artefacts>,
        shelf: Shelf,
        state: &Path,
        trouble: Trouble,
    ) -> Self {
        Self {
            engine,
            artefacts,
            shelf,
            state: state.into(),
            traffic: Traffic::default(),
            making: Arc::new(Semaphore::new(MAKING_MAX)),
            uploads: Arc::new(Semaphore::new(UPLOADS_MAX)),
            trouble,
        }
    }

    /// A blob of the running job.
    async fn of_running(&self, fetch: &Fetch) -> Result<Blob, Status> {
        let Some(current) = self.shelf.get(fetch.job) else {
            return Err(Status::not_found(format!("job {} is not running", fetch.job)));
        };
        if let Some(hash) = current.source.known_hash(&fetch.name).filter(|hash| Some(*hash) == fetch.have) {
            return Ok(Blob::Bytes { bytes: Default::default(), hash });
        }
        let _turn = self.making.acquire().await.map_err(|_| Status::unavailable("stopping"))?;
        let (name, have) = (fetch.name.clone(), fetch.have);
        let made = tokio::task::spawn_blocking(move || make(&current.source, &name, have)).await;
        let made = made.map_err(|e| Status::internal(format!("making a blob: {e}")))?;
        made.map_err(|error| status_of(&error))
    }

    /// Something by its hash: the plan, an artefact, a result.
    async fn by_hash(&self, fetch: &Fetch, hash: BlobHash, is_node: bool) -> Result<Blob, Status> {
        if is_node && self.shelf.get(fetch.job).is_some_and(|current| current.source.plan_hash() == hash) {
            return self.of_running(fetch).await;
        }
        let key = blake3::Hash::from_bytes(hash.0);
        let path = match self.result(fetch.job, key).await? {
            Some(path) => path,
            None if !is_node => {
                return Err(Status::not_found(format!(
                    "artefact {hash}: no file of job {}'s results",
                    fetch.job
                )));
            }
            None => self.artefacts.path(&key),
        };
        let opened = tokio::task::spawn_blocking(move || open(&path, hash)).await;
        opened.map_err(|e| Status::internal(format!("opening a file: {e}")))?
    }

    async fn result(&self, job: JobId, hash: blake3::Hash) -> Result<Option<PathBuf>, Status> {
        let files = match self.engine.ask(|reply| Ask::Results { job, reply }).await {
            Ok(files) => files,
            // Not finished, or not a job: then it can only be an artefact.
            Err(status) if status.code() != tonic::Code::Unavailable => return Ok(None),
            Err(status) => return Err(status),
        };
        let found = files.into_iter().find(|file| file.hash == hash);
        Ok(found.map(|file| JobFolder::new(&self.state, job).results().join(file.name)))
    }
}

/// A blob; of one whose copy is current only the hash.
fn make(source: &JobSource, name: &BlobName, have: Option<BlobHash>) -> Result<Blob, SourceError> {
    if let Some(hash) = have
        && source.is_current(name, hash)?
    {
        return Ok(Blob::Bytes { bytes: Default::default(), hash });
    }
    Ok(source.blob(name)?.map_or(Blob::None, |blob| Blob::Bytes { bytes: blob.bytes, hash: blob.hash }))
}

/// The receiver checks the hash of all bytes: a damaged file is found there.
fn open(path: &Path, hash: BlobHash) -> Result<Blob, Status> {
    let missing = |e: std::io::Error| match e.kind() {
        ErrorKind::NotFound => Status::not_found(format!("artefact {hash}: not here")),
        _ => Status::unavailable(format!("artefact {hash}: cannot be read: {e}")),
    };
    let file = File::open(path).map_err(missing)?;
    let size = file.metadata().map_err(missing)?.len();
    Ok(Blob::File { file, size, hash })
}

#[tonic::async_trait]
impl Service for DataService {
    type FetchStream = ReplyStream;

    async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let fetch = Fetch::asked(&request)?;
        let peer = Peer::of(&request)?;
        let (client, node) = (peer.is(&[Role::Client]), peer.is(&[Role::Node, Role::Coordinator]));
        if !client && self.shelf.get(fetch.job).is_none() {
            let why =
                format!("job {}: is not running, a node may fetch from the running job alone", fetch.job);
            return Err(Status::not_found(why));
        }
        let blob = match fetch.name {
            BlobName::Artefact(hash) => self.by_hash(&fetch, hash, node).await?,
            _ => self.of_running(&fetch).await?,
        };
        Ok(Response::new(serve(blob, &fetch, &self.traffic)?))
    }

    async fn upload(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<UploadReply>, Status> {
        let kept = self.keep(request).await;
        if let Err(status) = &kept
            && status.code() == tonic::Code::ResourceExhausted
        {
            self.trouble.tell(&status.message());
        }
        kept
    }
}

impl DataService {
    async fn keep(
        &self,
        request: Request<Streaming<UploadRequest>>,
    ) -> Result<Response<UploadReply>, Status> {
        let may_bring_inputs = Peer::of(&request)?.is(&[Role::Client]);
        let limit = if may_bring_inputs { INPUT_BYTES_MAX } else { ROUNDING_BYTES_MAX };
        let _turn = self.uploads.acquire().await.map_err(|_| Status::unavailable("stopping"))?;
        let sink = self.artefacts.create().map_err(|error| refused(&error))?;
        let (hash, sink) = receive(request.into_inner(), limit, sink, &self.traffic).await?;
        let finish = move || sink.finish(&blake3::Hash::from_bytes(hash.0));
        let finished = tokio::task::spawn_blocking(finish).await;
        let finished = finished.map_err(|e| Status::internal(format!("keeping an upload: {e}")))?;
        finished.map_err(|error| refused(&error))?;
        Ok(Response::new(UploadReply { hash: hash.to_vec() }))
    }
}

fn refused(error: &ArtefactError) -> Status {
    match error {
        ArtefactError::Storage { .. } => Status::resource_exhausted(error.to_string()),
        _ => Status::data_loss(error.to_string()),
    }
}
