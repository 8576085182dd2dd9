//! The data plane for code that blocks, such as a node's tasks.

use super::{DataClient, Fetched};
use crate::{BlobHash, Fetch};
use bytes::Bytes;
use halfstep_work::SourceError;
use tokio::runtime::Handle;

/// A [`DataClient`] whose calls wait. Not to be called on a thread of an async runtime.
#[derive(Clone)]
pub struct BlockingData {
    client: DataClient,
    runtime: Handle,
}

impl BlockingData {
    /// `runtime`: does the waiting; must have time and I/O enabled.
    pub fn new(client: DataClient, runtime: Handle) -> Self {
        Self { client, runtime }
    }

    /// [`DataClient::fetch`].
    ///
    /// # Errors
    /// The same.
    pub fn fetch(&self, fetch: Fetch, limit: u64) -> Result<Fetched, SourceError> {
        self.runtime.block_on(self.client.fetch(fetch, limit))
    }

    /// [`DataClient::upload`].
    ///
    /// # Errors
    /// The same.
    pub fn upload(&self, bytes: Bytes) -> Result<BlobHash, SourceError> {
        self.runtime.block_on(self.client.upload(bytes))
    }
}
