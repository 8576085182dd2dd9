//! Where the bytes of a blob go as they arrive, and the checks they pass before.

use super::CHUNK_MAX;
use crate::BlobHash;
use crate::telemetry::Damaged;
use crate::wire::{BlobChunk, BlobHeader};
use bytes::Bytes;
use halfstep_work::{FailureClass, SourceError};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

/// Takes the bytes of one blob in order. What it has is of use only once the whole has been checked.
pub trait Sink: Send + 'static {
    /// Whether `put` may wait for a device; it then runs on a thread for such things.
    const BLOCKS: bool;

    /// A blob of `size` bytes begins, perhaps again: anything before is forgotten.
    ///
    /// # Errors
    /// If there is no room.
    fn begin(&mut self, size: u64) -> io::Result<()>;

    /// The next bytes.
    ///
    /// # Errors
    /// If they cannot be kept.
    fn put(&mut self, bytes: &[u8]) -> io::Result<()>;
}

impl Sink for Vec<u8> {
    const BLOCKS: bool = false;

    fn begin(&mut self, size: u64) -> io::Result<()> {
        self.clear();
        let size = usize::try_from(size).map_err(io::Error::other)?;
        self.try_reserve_exact(size).map_err(io::Error::other)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }
}

/// From its start; not synced.
impl Sink for File {
    const BLOCKS: bool = true;

    fn begin(&mut self, _size: u64) -> io::Result<()> {
        self.set_len(0)?;
        self.seek(SeekFrom::Start(0)).map(drop)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }
}

/// A blob on its way into a sink: what has been promised, what has come.
pub(super) struct Arriving<S> {
    /// `None` only while a chunk is being put, and if that was cut short.
    sink: Option<S>,
    promised: Option<(u64, BlobHash)>,
    pub(super) received: u64,
    /// How often it began.
    pub(super) begun: u32,
    hasher: blake3::Hasher,
}

impl<S: Sink> Arriving<S> {
    pub(super) fn new(sink: S) -> Self {
        Self { sink: Some(sink), promised: None, received: 0, begun: 0, hasher: blake3::Hasher::new() }
    }

    /// Takes a header. Returns whether it promises what the one before did, so that the bytes received still count.
    pub(super) async fn header(&mut self, header: &BlobHeader, limit: u64) -> Result<bool, SourceError> {
        let hash = BlobHash::try_from(header.hash.as_slice())
            .map_err(|error| SourceError::new(FailureClass::Internal, error))?;
        if header.size > limit {
            let problem = format!("blob {hash}: expected at most {limit} bytes, found {}", header.size);
            return Err(SourceError::new(FailureClass::Internal, problem));
        }
        if self.promised == Some((header.size, hash)) {
            return Ok(true);
        }
        self.promised = Some((header.size, hash));
        self.restart().await?;
        Ok(false)
    }

    /// Forgets what has come.
    pub(super) async fn restart(&mut self) -> Result<(), SourceError> {
        self.received = 0;
        self.begun += 1;
        self.hasher.reset();
        let size = self.promised.map_or(0, |(size, _)| size);
        self.with_sink(move |sink| sink.begin(size)).await
    }

    /// Takes the next chunk.
    pub(super) async fn chunk(&mut self, chunk: BlobChunk) -> Result<(), SourceError> {
        let damaged = |problem| Err(damaged(problem));
        let wrong = |problem| Err(SourceError::new(FailureClass::Internal, problem));
        let Some((size, hash)) = self.promised else {
            return wrong("chunk of a blob without a header".to_owned());
        };
        let (offset, len) = (chunk.offset, chunk.data.len());
        if offset != self.received || len == 0 || len > CHUNK_MAX || len as u64 > size - self.received {
            let expected = format!("expected the bytes from {} of {size}", self.received);
            return wrong(format!("blob {hash}: {expected}, found {len} from {offset}"));
        }
        let crc = crc32c::crc32c(&chunk.data);
        if crc != chunk.crc32c {
            let sums = format!("expected checksum {:08x}, found {crc:08x}", chunk.crc32c);
            return damaged(format!("blob {hash}: chunk at {offset} was damaged on the way, {sums}"));
        }
        self.hasher.update(&chunk.data);
        self.received += len as u64;
        self.put(chunk.data).await
    }

    async fn put(&mut self, data: Bytes) -> Result<(), SourceError> {
        self.with_sink(move |sink| sink.put(&data)).await
    }

    async fn with_sink(
        &mut self,
        act: impl FnOnce(&mut S) -> io::Result<()> + Send + 'static,
    ) -> Result<(), SourceError> {
        let Some(mut sink) = self.sink.take() else {
            return Err(SourceError::new(FailureClass::Internal, "an earlier write was cut short"));
        };
        let (sink, acted) = if S::BLOCKS {
            let act = move || {
                let acted = act(&mut sink);
                (sink, acted)
            };
            tokio::task::spawn_blocking(act)
                .await
                .map_err(|error| SourceError::new(FailureClass::Internal, error))?
        } else {
            let acted = act(&mut sink);
            (sink, acted)
        };
        self.sink = Some(sink);
        acted.map_err(|error| {
            SourceError::new(FailureClass::Storage, format!("received bytes cannot be kept: {error}"))
        })
    }

    /// Whether all bytes have come.
    pub(super) fn complete(&self) -> bool {
        self.promised.is_some_and(|(size, _)| size == self.received)
    }

    /// Whether the bytes are the promised ones.
    pub(super) fn verify(&self) -> Result<BlobHash, SourceError> {
        let Some((size, hash)) = self.promised else {
            return Err(SourceError::new(FailureClass::Internal, "blob without a header"));
        };
        if self.received < size {
            let problem = format!("blob {hash}: ends after {} of {size} bytes", self.received);
            return Err(SourceError::new(FailureClass::PeerLost, problem));
        }
        let actual = BlobHash::from(self.hasher.finalize());
        if actual != hash {
            let problem = format!("blob {hash}: was damaged, its bytes have the hash {actual}");
            return Err(damaged(problem));
        }
        Ok(hash)
    }

    /// The sink with everything in it.
    pub(super) fn into_sink(self) -> Result<S, SourceError> {
        self.sink.ok_or_else(|| SourceError::new(FailureClass::Internal, "an earlier write was cut short"))
    }
}

fn damaged(problem: String) -> SourceError {
    Damaged::Received.count();
    SourceError::new(FailureClass::Damaged, problem)
}
