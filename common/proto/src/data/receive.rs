//! Answering an upload.

use super::sink::Arriving;
use super::{Sink, Traffic, status_of};
use crate::BlobHash;
use crate::wire::{UploadRequest, upload_request};
use std::time::Duration;
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

/// How long the next chunk may take.
const CHUNK_WAIT: Duration = Duration::from_secs(30);

/// Takes an uploaded blob of at most `limit` bytes into `sink` and checks it. It is not durable yet: that is for the
/// caller to see to before it answers.
///
/// # Errors
/// Whatever is wrong with the blob or its chunks; `resource_exhausted` if the sink cannot keep it.
pub async fn receive<S: Sink>(
    mut stream: impl Stream<Item = Result<UploadRequest, Status>> + Unpin,
    limit: u64,
    sink: S,
    traffic: &Traffic,
) -> Result<(BlobHash, S), Status> {
    let mut blob = Arriving::new(sink);
    let mut begun = false;
    loop {
        let silent = |_| Status::deadline_exceeded("no further chunk of the upload has come");
        let Some(message) = timeout(CHUNK_WAIT, stream.next()).await.map_err(silent)? else {
            break;
        };
        match message?.body {
            Some(upload_request::Body::Header(header)) if !begun => {
                begun = true;
                blob.header(&header, limit).await.map_err(|error| status_of(&error))?;
            }
            Some(upload_request::Body::Chunk(chunk)) if begun => {
                traffic.receive(&chunk);
                blob.chunk(chunk).await.map_err(|error| status_of(&error))?;
            }
            _ => return Err(Status::invalid_argument("upload: expected one header, then chunks")),
        }
    }
    let hash = blob.verify().map_err(|error| status_of(&error))?;
    Ok((hash, blob.into_sink().map_err(|error| status_of(&error))?))
}
