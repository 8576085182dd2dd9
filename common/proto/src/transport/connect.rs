//! Channels to an address.

use super::{BoxIo, Network, Security, TransportError};
use crate::Role;
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::AlertDescription;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

/// Time to connect, with the TLS handshake and the first words of the other side.
const CONNECT: Duration = Duration::from_secs(5);
/// Pings on a connection, and how long an answer may take. Heartbeats and leases find silent peers earlier.
const PING: Duration = Duration::from_secs(10);
const PING_ANSWER: Duration = Duration::from_secs(30);
/// Bytes of a server's first words that are read ahead.
const GREETING: usize = 1024;
/// Bytes that may be on the way unread: one stream, one connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

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
        let failed = |message| TransportError::Connect { address: self.address.clone(), message };
        let connected = async {
            let io = self.network.connect(self.address.clone()).await?;
            let secured = self.security.connect(io, &self.address, self.expects).await;
            let greeted = async { greeted(secured?).await };
            greeted.await.map_err(|error| failed(format!("{}{}", causes(&error), self.security.doubt())))
        };
        let late = |_| failed(format!("no answer within {CONNECT:?}{}", self.security.doubt()));
        timeout(CONNECT, connected).await.map_err(late)?.map(TokioIo::new)
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
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING_ANSWER)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
}

impl Security {
    /// What may be wrong when nobody answers.
    fn doubt(&self) -> &'static str {
        match self {
            Self::Plaintext | Self::Public => ", perhaps because it wants certificates",
            Self::Tls(_) => "",
        }
    }

    /// Makes sure of who is there.
    async fn connect(&self, io: BoxIo, address: &str, expects: Role) -> io::Result<BoxIo> {
        match self {
            Self::Plaintext | Self::Public => Ok(io),
            Self::Tls(tls) => {
                let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
                let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                let name = ServerName::try_from(host).map_err(io::Error::other)?;
                Ok(Box::new(TlsConnector::from(tls.client(expects)).connect(name, io).await?))
            }
        }
    }
}

/// Waits for the other side's first words, which in HTTP/2 a server may say at once: it is no stranger, and content with
/// this side's certificate. With TLS 1.3 it can refuse that after the handshake.
async fn greeted(io: BoxIo) -> io::Result<BoxIo> {
    let mut io = BufReader::with_capacity(GREETING, io);
    if io.fill_buf().await?.is_empty() {
        return Err(io::Error::other("the peer closed the connection at once"));
    }
    Ok(Box::new(io))
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
        let text = meaning(error).map_or_else(|| error.to_string(), str::to_owned);
        if !texts.iter().any(|known| known.contains(&text)) {
            texts.retain(|known| !text.contains(known.as_str()));
            texts.push(text);
        }
        next = error.source();
    }
    // What tonic calls whatever happens to a connection: says nothing if more is known.
    if texts.len() > 1 {
        texts.retain(|text| text != "transport error");
    }
    texts.join(": ")
}

/// What a TLS alert of the other side means here.
fn meaning(error: &(dyn Error + 'static)) -> Option<&'static str> {
    let error = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref)?;
    let tokio_rustls::rustls::Error::AlertReceived(alert) = error.downcast_ref()? else {
        return None;
    };
    match alert {
        AlertDescription::CertificateRequired => Some("the peer wants a certificate and was shown none"),
        AlertDescription::UnknownCA => {
            Some("the peer does not know the authority of this side's certificate")
        }
        AlertDescription::CertificateExpired => {
            Some("the peer finds this side's certificate expired or not yet valid")
        }
        AlertDescription::BadCertificate | AlertDescription::DecryptError => {
            Some("the peer cannot verify this side's certificate")
        }
        _ => None,
    }
}
