//! Counting the bytes of blobs, and, for tests, harming them on the way.

use crate::telemetry;
use crate::wire::BlobChunk;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tonic::Status;

/// What tests do to a chunk after its checksum was taken: change it, or break the stream.
pub type Tamper = Arc<dyn Fn(&mut BlobChunk) -> Result<(), Status> + Send + Sync>;

/// Bytes of blobs that a process has sent and received; clones count together.
#[derive(Clone, Default)]
pub struct Traffic {
    counts: Arc<Counts>,
    tamper: Option<Tamper>,
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Traffic {
    /// The same counters, with every chunk sent going through `tamper`. For tests.
    #[must_use]
    pub fn tampered(&self, tamper: Tamper) -> Self {
        Self { counts: self.counts.clone(), tamper: Some(tamper) }
    }

    /// Bytes of chunks sent.
    pub fn sent(&self) -> u64 {
        self.counts.sent.load(Ordering::Relaxed)
    }

    /// Bytes of chunks received.
    pub fn received(&self) -> u64 {
        self.counts.received.load(Ordering::Relaxed)
    }

    pub(super) fn send(&self, mut chunk: BlobChunk) -> Result<BlobChunk, Status> {
        self.counts.sent.fetch_add(chunk.data.len() as u64, Ordering::Relaxed);
        telemetry::sent(chunk.data.len());
        if let Some(tamper) = &self.tamper {
            tamper(&mut chunk)?;
        }
        Ok(chunk)
    }

    pub(super) fn receive(&self, chunk: &BlobChunk) {
        self.counts.received.fetch_add(chunk.data.len() as u64, Ordering::Relaxed);
        telemetry::received(chunk.data.len());
    }
}

impl fmt::Debug for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes sent, {} received", self.sent(), self.received())
    }
}
