//! Fetching from a data plane.

use super::codes::{broken, error_of};
use super::sink::Arriving;
use super::{Sink, Traffic};
use crate::wire::artefacts_client::ArtefactsClient;
use crate::wire::{BlobHeader, FetchReply, FetchRequest, fetch_reply};
use crate::{BlobHash, Connector, Fetch};
use bytes::Bytes;
use halfstep_work::{FailureClass, SourceError};
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// How long and how often a client tries.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Streams opened for one blob without one byte of it coming (a stream that brought some starts the count anew),
    /// and how often a blob may turn out damaged or changed as a whole.
    pub attempts: u32,
    /// Between the first and the second; doubles each time.
    pub pause: Duration,
    /// For the header: the peer may have to gather the blob first.
    pub header: Duration,
    /// For each chunk.
    pub chunk: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            attempts: 4,
            pause: Duration::from_millis(100),
            header: Duration::from_secs(60),
            chunk: Duration::from_secs(30),
        }
    }
}

/// A blob fetched into memory, or why there is none to fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// All of it, checked.
    Blob {
        /// Its bytes.
        bytes: Bytes,
        /// Their hash.
        hash: BlobHash,
    },
    /// The copy named in the request is current.
    Same,
    /// There is none and will be none.
    None,
}

/// A blob fetched into a sink, or why there is none to fetch.
#[derive(Debug)]
pub enum FetchedInto<S> {
    /// All of it is in the sink, checked.
    Blob {
        /// The sink.
        sink: S,
        /// Hash of the bytes in it.
        hash: BlobHash,
    },
    /// The copy named in the request is current.
    Same,
    /// There is none and will be none.
    None,
}

/// A line to the data plane of one process; clones share the connection.
#[derive(Clone)]
pub struct DataClient {
    pub(super) channel: Channel,
    pub(super) peer: String,
    pub(super) traffic: Traffic,
    pub(super) patience: Patience,
}

/// How one stream ended without the blob.
enum Break {
    /// Another stream may go on.
    Again(SourceError),
    /// It is no use.
    Final(SourceError),
}

enum Header {
    Blob(BlobHeader),
    Same,
    None,
}

impl DataClient {
    /// Connects when first used.
    pub fn new(connector: &Connector, traffic: Traffic) -> Self {
        Self::with_channel(connector.channel(), connector.address(), traffic)
    }

    /// Over a channel that exists. `peer`: its name in errors.
    pub fn with_channel(channel: Channel, peer: &str, traffic: Traffic) -> Self {
        Self { channel, peer: peer.to_owned(), traffic, patience: Patience::default() }
    }

    /// With other patience than the default.
    #[must_use]
    pub fn with_patience(self, patience: Patience) -> Self {
        Self { patience, ..self }
    }

    /// Fetches a blob of at most `limit` bytes into memory. `fetch.offset` is not looked at.
    ///
    /// # Errors
    /// `PeerLost` if the peer cannot be reached, does not answer or does not have it; `Damaged` if it comes damaged every
    /// time; the peer's class otherwise.
    pub async fn fetch(&self, fetch: Fetch, limit: u64) -> Result<Fetched, SourceError> {
        Ok(match self.fetch_into(fetch, limit, Vec::new()).await? {
            FetchedInto::Blob { sink, hash } => Fetched::Blob { bytes: Bytes::from(sink), hash },
            FetchedInto::Same => Fetched::Same,
            FetchedInto::None => Fetched::None,
        })
    }

    /// Fetches a blob of at most `limit` bytes into `sink`, such as a file.
    ///
    /// # Errors
    /// As `fetch`; `Storage` if the sink cannot keep it.
    pub async fn fetch_into<S: Sink>(
        &self,
        fetch: Fetch,
        limit: u64,
        sink: S,
    ) -> Result<FetchedInto<S>, SourceError> {
        let mut blob = Arriving::new(sink);
        let mut request = FetchRequest::from(fetch);
        let mut failures = 0;
        loop {
            let before = blob.received;
            request.offset = before;
            let error = match self.stream(&request, limit, &mut blob).await {
                Ok(Header::Same) => return Ok(FetchedInto::Same),
                Ok(Header::None) => return Ok(FetchedInto::None),
                Ok(Header::Blob(_)) => match blob.verify() {
                    Ok(hash) => return Ok(FetchedInto::Blob { sink: blob.into_sink()?, hash }),
                    Err(error) => {
                        if blob.complete() {
                            blob.restart().await?;
                        }
                        error
                    }
                },
                Err(Break::Again(error)) => error,
                Err(Break::Final(error)) => return Err(error),
            };
            failures = if blob.received > before { 1 } else { failures + 1 };
            if failures >= self.patience.attempts || blob.begun > self.patience.attempts {
                return Err(error);
            }
            tracing::debug!(peer = self.peer, received = blob.received, failures, %error, "fetch goes on");
            sleep(self.patience.pause * 2_u32.saturating_pow(failures - 1)).await;
        }
    }

    /// One stream, to its end.
    async fn stream<S: Sink>(
        &self,
        request: &FetchRequest,
        limit: u64,
        blob: &mut Arriving<S>,
    ) -> Result<Header, Break> {
        let mut client = ArtefactsClient::new(self.channel.clone());
        let opened = async {
            let mut stream = client.fetch(request.clone()).await?.into_inner();
            let header = stream.message().await?;
            Ok::<_, Status>((stream, header))
        };
        let (mut stream, header) = self.within(self.patience.header, opened).await?;
        let header = match self.header(header)? {
            Header::Blob(header) => header,
            other => return Ok(other),
        };
        if !blob.header(&header, limit).await.map_err(Break::Final)? && request.offset > 0 {
            let changed = format!("{}: the blob has changed while it was fetched", self.peer);
            return Err(Break::Again(SourceError::new(FailureClass::PeerLost, changed)));
        }
        self.chunks(&mut stream, blob).await?;
        Ok(Header::Blob(header))
    }

    async fn chunks<S: Sink>(
        &self,
        stream: &mut Streaming<FetchReply>,
        blob: &mut Arriving<S>,
    ) -> Result<(), Break> {
        while let Some(message) = self.within(self.patience.chunk, stream.message()).await? {
            let Some(fetch_reply::Body::Chunk(chunk)) = message.body else {
                return Err(Break::Final(self.nonsense("expected a chunk after the header")));
            };
            self.traffic.receive(&chunk);
            blob.chunk(chunk).await.map_err(|error| match error.class {
                FailureClass::Damaged => Break::Again(error),
                _ => Break::Final(error),
            })?;
        }
        Ok(())
    }

    fn header(&self, message: Option<FetchReply>) -> Result<Header, Break> {
        match message.and_then(|message| message.body) {
            Some(fetch_reply::Body::Header(header)) if header.none => Ok(Header::None),
            Some(fetch_reply::Body::Header(header)) if header.same => Ok(Header::Same),
            Some(fetch_reply::Body::Header(header)) => Ok(Header::Blob(header)),
            _ => Err(Break::Final(self.nonsense("expected a header first"))),
        }
    }

    async fn within<T>(
        &self,
        limit: Duration,
        step: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Break> {
        match timeout(limit, step).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(status)) if broken(&status) => Err(Break::Again(error_of(&status, &self.peer))),
            Ok(Err(status)) => Err(Break::Final(error_of(&status, &self.peer))),
            Err(_) => {
                let silent = format!("{}: no answer within {limit:?}", self.peer);
                Err(Break::Again(SourceError::new(FailureClass::PeerLost, silent)))
            }
        }
    }

    pub(super) fn nonsense(&self, problem: &str) -> SourceError {
        SourceError::new(FailureClass::Internal, format!("{}: {problem}", self.peer))
    }
}
