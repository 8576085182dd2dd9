//! Channels to an address.

use super::{BoxIo, Network, Security, TransportError};
use crate::Role;
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

/// Time to connect, the TLS handshake included.
const CONNECT: Duration = Duration::from_secs(5);
/// Pings on a connection, and how long an answer may take. Heartbeats and leases find silent peers earlier.
const PING: Duration = Duration::from_secs(10);
const PING_ANSWER: Duration = Duration::from_secs(20);
/// Bytes that may be on the way unread: one stream, one connection.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// The way to one address.
#[derive(Clone)]
pub struct Connector {
    network: Arc<dyn Network>,
    security: Security,
    address: String,
    expects: Role,
}

impl Connector {
    pub(super) fn new(network: Arc<dyn Network>, security: Security, address: String, expects: Role) -> Self {
        Self { network, security, address, expects }
    }

    /// Where it leads.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A channel that connects when it is first used, and again after the connection was lost.
    pub fn channel(&self) -> Channel {
        endpoint().connect_with_connector_lazy(self.service())
    }

    /// A channel that is connected now (and again after the connection was lost).
    ///
    /// # Errors
    /// `Connect` with all causes, or why the address cannot be used at all.
    pub async fn connect(&self) -> Result<Channel, TransportError> {
        let failed = |error: tonic::transport::Error| TransportError::Connect {
            address: self.address.clone(),
            message: causes(&error),
        };
        endpoint().connect_with_connector(self.service()).await.map_err(failed)
    }

    async fn open(self) -> Result<TokioIo<BoxIo>, TransportError> {
        let io = self.network.connect(self.address.clone()).await?;
        let io = self.security.connect(io, &self.address, self.expects).await?;
        Ok(TokioIo::new(io))
    }

    fn service(
        &self,
    ) -> impl tower::Service<
        Uri,
        Response = TokioIo<BoxIo>,
        Error = TransportError,
        Future = impl Future<Output = Result<TokioIo<BoxIo>, TransportError>> + Send,
    > + Send
    + 'static {
        let connector = self.clone();
        tower::service_fn(move |_: Uri| connector.clone().open())
    }
}

/// The address in it is nobody's: connectors know where they lead.
fn endpoint() -> Endpoint {
    Endpoint::from_static("http://halfstep")
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING_ANSWER)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
}

impl Security {
    async fn connect(&self, io: BoxIo, _address: &str, _expects: Role) -> Result<BoxIo, TransportError> {
        match self {
            Self::Plaintext => Ok(io),
        }
    }
}

/// A refusal or loss as one sentence with all causes; tonic's own text keeps them to itself.
pub fn explain(status: &Status) -> String {
    match status.source() {
        Some(source) => causes(source),
        None => status.message().to_owned(),
    }
}

/// The innermost causes say most; the outermost ("transport error") least.
fn causes(error: &(dyn Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !texts.iter().any(|known| known.contains(&text)) {
            texts.retain(|known| !text.contains(known.as_str()));
            texts.push(text);
        }
        next = error.source();
    }
    texts.join(": ")
}
