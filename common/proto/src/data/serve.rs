//! Answering a fetch.

use super::{CHUNK, Traffic};
use crate::wire::{BlobChunk, BlobHeader, FetchReply, fetch_reply};
use crate::{BlobHash, Fetch};
use bytes::Bytes;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::pin::Pin;
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::Status;

/// The type of a handler's `FetchStream`.
pub type ReplyStream = Pin<Box<dyn Stream<Item = Result<FetchReply, Status>> + Send>>;

/// A blob that can be sent.
pub enum Blob {
    /// In memory.
    Bytes {
        /// Its bytes; chunks are views of them.
        bytes: Bytes,
        /// Their hash.
        hash: BlobHash,
    },
    /// In a file, read as the peer takes it.
    File {
        /// Open, from its start.
        file: File,
        /// Its size in bytes.
        size: u64,
        /// Hash of its bytes.
        hash: BlobHash,
    },
    /// There is none and will be none.
    None,
}

impl Blob {
    /// A blob in memory, hashed here: about a millisecond for 2 MB.
    pub fn new(bytes: Bytes) -> Self {
        let hash = BlobHash::of(&bytes);
        Self::Bytes { bytes, hash }
    }
}

/// The answer to `fetch`: a header, then the chunks from the offset asked for, unless the caller has them.
///
/// # Errors
/// `out_of_range` if the offset lies beyond the end.
pub fn serve(blob: Blob, fetch: &Fetch, traffic: &Traffic) -> Result<ReplyStream, Status> {
    let (size, hash) = match &blob {
        Blob::Bytes { bytes, hash } => (bytes.len() as u64, *hash),
        Blob::File { size, hash, .. } => (*size, *hash),
        Blob::None => return Ok(only(BlobHeader { none: true, ..BlobHeader::default() })),
    };
    let same = fetch.have == Some(hash);
    let header = BlobHeader { size, hash: hash.to_vec(), same, none: false };
    if same {
        return Ok(only(header));
    }
    if fetch.offset > size {
        let problem = format!("blob {hash}: has {size} bytes, asked for from {}", fetch.offset);
        return Err(Status::out_of_range(problem));
    }
    let header = only(header);
    let (offset, traffic) = (fetch.offset, traffic.clone());
    Ok(match blob {
        Blob::Bytes { bytes, .. } => {
            Box::pin(header.chain(tokio_stream::iter(slices(bytes, offset, traffic))))
        }
        Blob::File { file, .. } => {
            let (sender, receiver) = mpsc::channel(2);
            tokio::task::spawn_blocking(move || {
                if let Err(error) = read(file, offset, size, &traffic, &sender) {
                    // Fails if the peer went away: nobody is interested.
                    let _ = sender.blocking_send(Err(error));
                }
            });
            Box::pin(header.chain(ReceiverStream::new(receiver)))
        }
        Blob::None => header,
    })
}

fn only(header: BlobHeader) -> ReplyStream {
    let body = Some(fetch_reply::Body::Header(header));
    Box::pin(tokio_stream::once(Ok(FetchReply { body })))
}

fn reply(offset: u64, data: Bytes, traffic: &Traffic) -> Result<FetchReply, Status> {
    let chunk = traffic.send(chunk(offset, data))?;
    Ok(FetchReply { body: Some(fetch_reply::Body::Chunk(chunk)) })
}

pub(super) fn chunk(offset: u64, data: Bytes) -> BlobChunk {
    BlobChunk { offset, crc32c: crc32c::crc32c(&data), data }
}

fn slices(
    bytes: Bytes,
    offset: u64,
    traffic: Traffic,
) -> impl Iterator<Item = Result<FetchReply, Status>> + Send {
    // The caller has checked that the offset lies inside.
    let start = usize::try_from(offset).unwrap_or(bytes.len());
    (start..bytes.len()).step_by(CHUNK).map(move |at| {
        let end = bytes.len().min(at + CHUNK);
        reply(at as u64, bytes.slice(at..end), &traffic)
    })
}

fn read(
    mut file: File,
    offset: u64,
    size: u64,
    traffic: &Traffic,
    sender: &mpsc::Sender<Result<FetchReply, Status>>,
) -> Result<(), Status> {
    let failed = |error: std::io::Error| Status::data_loss(format!("a stored blob cannot be read: {error}"));
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let mut at = offset;
    while at < size {
        let data = next_chunk(&mut file, size - at).map_err(failed)?;
        let len = data.len() as u64;
        if sender.blocking_send(reply(at, data, traffic)).is_err() {
            return Ok(());
        }
        at += len;
    }
    Ok(())
}

/// The next chunk of a file with `left` bytes to come.
pub(super) fn next_chunk(file: &mut impl Read, left: u64) -> std::io::Result<Bytes> {
    let len = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
    let mut data = vec![0; len];
    file.read_exact(&mut data)?;
    Ok(Bytes::from(data))
}
