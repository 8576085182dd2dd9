//! Uploading to a data plane.

use super::codes::{broken, error_of};
use super::serve::{chunk, next_chunk};
use super::{CHUNK, DataClient, Traffic};
use crate::BlobHash;
use crate::wire::artefacts_client::ArtefactsClient;
use crate::wire::{BlobHeader, UploadRequest, upload_request};
use bytes::Bytes;
use halfstep_work::{FailureClass, SourceError};
use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::Status;

/// A message of an upload; an error ends the stream.
type Chunk = Option<UploadRequest>;

impl DataClient {
    /// Uploads a blob; on return it is durable there under its hash.
    ///
    /// # Errors
    /// `PeerLost` if the peer cannot be reached or does not answer, the peer's class otherwise.
    pub async fn upload(&self, bytes: Bytes) -> Result<BlobHash, SourceError> {
        let hash = BlobHash::of(&bytes);
        let header = message_header(bytes.len() as u64, hash);
        let messages = || {
            let (bytes, traffic) = (bytes.clone(), self.traffic.clone());
            let chunks = (0..bytes.len()).step_by(CHUNK).map_while(move |at| {
                let end = bytes.len().min(at + CHUNK);
                message(at as u64, bytes.slice(at..end), &traffic)
            });
            tokio_stream::iter([header.clone()].into_iter().chain(chunks))
        };
        self.send(hash, messages).await
    }

    /// Uploads a file; on return it is durable there under its hash. Reads it twice: hash first.
    ///
    /// # Errors
    /// As `upload`; `BadInput` if the file cannot be read.
    pub async fn upload_file(&self, path: &Path) -> Result<BlobHash, SourceError> {
        let unreadable = |error: &dyn std::fmt::Display| {
            SourceError::new(FailureClass::BadInput, format!("`{}` cannot be read: {error}", path.display()))
        };
        let owned = path.to_owned();
        let (size, hash) = tokio::task::spawn_blocking(move || hash_file(&owned))
            .await
            .map_err(|error| unreadable(&error))?
            .map_err(|error| unreadable(&error))?;
        let messages = || {
            let (sender, receiver) = mpsc::channel(2);
            let (path, traffic) = (path.to_owned(), self.traffic.clone());
            tokio::task::spawn_blocking(move || {
                // A file that cannot be read any more ends the stream early: the peer refuses the rest.
                let _ = read(path, size, hash, &traffic, &sender);
            });
            ReceiverStream::new(receiver)
        };
        self.send(hash, messages).await
    }

    /// One try, for as long as messages leave or the answer comes.
    async fn attempt<M>(&self, messages: M) -> Result<Vec<u8>, Status>
    where
        M: Stream<Item = UploadRequest> + Send + 'static,
    {
        let taken = Arc::new(AtomicU64::new(0));
        let mut client = ArtefactsClient::new(self.channel.clone());
        let mut answer = pin!(client.upload(counted(messages, taken.clone())));
        let mut before = None;
        loop {
            if let Ok(reply) = timeout(self.patience.header, &mut answer).await {
                return Ok(reply?.into_inner().hash);
            }
            let now = Some(taken.load(Ordering::Relaxed));
            if now == before {
                return Err(Status::unavailable(format!("no answer within {:?}", self.patience.header)));
            }
            before = now;
        }
    }

    async fn send<M>(&self, hash: BlobHash, messages: impl Fn() -> M) -> Result<BlobHash, SourceError>
    where
        M: Stream<Item = UploadRequest> + Send + 'static,
    {
        let mut failures = 0;
        loop {
            let status = match self.attempt(messages()).await {
                Ok(stored) if stored == hash.0 => return Ok(hash),
                Ok(_) => return Err(self.nonsense("stored the upload under another hash")),
                Err(status) => status,
            };
            failures += 1;
            let harmed = status.code() == tonic::Code::DataLoss;
            if !(broken(&status) || harmed) || failures >= self.patience.attempts {
                return Err(error_of(&status, &self.peer));
            }
            tracing::debug!(peer = self.peer, failures, error = status.message(), "upload again");
            sleep(self.patience.pause * 2_u32.saturating_pow(failures - 1)).await;
        }
    }
}

/// Counts what has been taken from a stream.
fn counted<M: Stream>(messages: M, taken: Arc<AtomicU64>) -> impl Stream<Item = M::Item> {
    messages.map(move |message| {
        taken.fetch_add(1, Ordering::Relaxed);
        message
    })
}

fn message_header(size: u64, hash: BlobHash) -> UploadRequest {
    let header = BlobHeader { size, hash: hash.to_vec(), ..BlobHeader::default() };
    UploadRequest { body: Some(upload_request::Body::Header(header)) }
}

/// `None` where a test breaks the stream.
fn message(offset: u64, data: Bytes, traffic: &Traffic) -> Chunk {
    let sent: Result<_, Status> = traffic.send(chunk(offset, data));
    Some(UploadRequest { body: Some(upload_request::Body::Chunk(sent.ok()?)) })
}

fn hash_file(path: &Path) -> io::Result<(u64, BlobHash)> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut file)?;
    Ok((file.stream_position()?, BlobHash::from(hasher.finalize())))
}

fn read(
    path: PathBuf,
    size: u64,
    hash: BlobHash,
    traffic: &Traffic,
    sender: &mpsc::Sender<UploadRequest>,
) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut next = Some(message_header(size, hash));
    let mut at = 0;
    while let Some(message_to_send) = next {
        if sender.blocking_send(message_to_send).is_err() || at == size {
            break;
        }
        let data = next_chunk(&mut file, size - at)?;
        let offset = at;
        at += data.len() as u64;
        next = message(offset, data, traffic);
    }
    Ok(())
}
