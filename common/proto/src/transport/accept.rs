//! Accepting connections: bounded in number, each made ready in a task of its own so that a slow one holds up nobody.

use super::{Accept, BoxIo, Connection, Security};
use crate::telemetry::{self, Rejected};
use crate::{Certified, Peer};
use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, rustls};
use tokio_stream::Stream;

/// How much of this process its peers may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections from one place at a time; more are closed at once.
    pub connections_per_peer: usize,
    /// Connections at a time from everywhere; more are closed at once.
    pub connections: usize,
    /// Requests being answered at a time on one connection; more wait.
    pub requests_per_connection: usize,
    /// Time for a TLS handshake.
    pub handshake: Duration,
    /// A connection without a byte from its peer for so long is closed. More than two rounds of pings.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_per_peer: 256,
            connections: 4096,
            requests_per_connection: 256,
            handshake: Duration::from_secs(5),
            idle: Duration::from_secs(60),
        }
    }
}

/// An address where connections arrive; open, but nobody answers until it is served.
pub struct Listener {
    accept: Box<dyn Accept>,
    security: Security,
    limits: Limits,
}

impl Listener {
    pub(super) fn new(accept: Box<dyn Accept>, security: Security) -> Self {
        Self { accept, security, limits: Limits::default() }
    }

    /// With other limits than the default ones.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// `host:port` with the port that was taken.
    pub fn address(&self) -> String {
        self.accept.address()
    }

    /// Begins to accept. Dropping the result frees the address; connections already handed out live on.
    pub fn incoming(self) -> Incoming {
        let (ready, connections) = mpsc::channel(64);
        let acceptor =
            Acceptor { security: self.security, limits: self.limits, ready, places: BTreeMap::new() };
        let task = tokio::spawn(acceptor.run(self.accept));
        Incoming { connections, task }
    }
}

/// Connections that are ready to be spoken on.
pub struct Incoming {
    connections: mpsc::Receiver<Connection>,
    task: JoinHandle<()>,
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.connections.poll_recv(cx).map(|next| next.map(Ok))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Acceptor {
    security: Security,
    limits: Limits,
    ready: mpsc::Sender<Connection>,
    places: BTreeMap<String, Arc<Semaphore>>,
}

impl Acceptor {
    async fn run(mut self, mut accept: Box<dyn Accept>) {
        loop {
            match accept.accept().await {
                Ok((io, place)) => self.take(io, place),
                Err(error) => {
                    // Out of descriptors, as a rule: others may be freed.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn take(&mut self, io: BoxIo, place: String) {
        let Some(counted) = self.count(&place) else {
            telemetry::rejected(Rejected::TooMany);
            tracing::warn!(place, limits = ?self.limits, "connection closed: too many");
            return;
        };
        let (security, limits, ready) = (self.security.clone(), self.limits, self.ready.clone());
        tokio::spawn(async move {
            match security.accept(io, limits.handshake).await {
                Ok((io, peer)) => {
                    let connection = Connection::new(io, peer, limits.idle, counted);
                    // Fails when nobody serves any more.
                    let _ = ready.send(connection).await;
                }
                Err((reason, error)) => {
                    telemetry::rejected(reason);
                    tracing::warn!(place, error, "connection refused");
                }
            }
        });
    }

    /// A place among the connections, counting those whose handshake goes on.
    fn count(&mut self, place: &str) -> Option<OwnedSemaphorePermit> {
        let most = self.limits.connections_per_peer;
        self.places.retain(|_, free| free.available_permits() < most);
        let used: usize = self.places.values().map(|free| most - free.available_permits()).sum();
        if used >= self.limits.connections {
            return None;
        }
        let free = self.places.entry(place.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(most)));
        free.clone().try_acquire_owned().ok()
    }
}

impl Security {
    /// Finds out who has connected, within `limit`.
    async fn accept(&self, io: BoxIo, limit: Duration) -> Result<(BoxIo, Peer), (Rejected, String)> {
        match self {
            Self::Plaintext => Ok((io, Peer::Local)),
            Self::Public => Ok((io, Peer::Anybody)),
            Self::Tls(tls) => {
                let handshake = TlsAcceptor::from(tls.server()).accept(io);
                let late = |_| (Rejected::Handshake, format!("no TLS handshake within {limit:?}"));
                let refused = |error: io::Error| (reason_of(&error), error.to_string());
                let io = timeout(limit, handshake).await.map_err(late)?.map_err(refused)?;
                // The handshake has checked the certificate.
                let certificate = io.get_ref().1.peer_certificates().and_then(|chain| chain.first());
                let certificate =
                    certificate.ok_or((Rejected::NoCertificate, "no certificate".to_owned()))?;
                let certified =
                    Certified::read(certificate).map_err(|error| (Rejected::BadCertificate, error))?;
                Ok((Box::new(io), Peer::Certified(Arc::new(certified))))
            }
        }
    }
}

/// What of a handshake went wrong.
fn reason_of(error: &io::Error) -> Rejected {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(rustls::Error::NoCertificatesPresented) => Rejected::NoCertificate,
        Some(rustls::Error::InvalidCertificate(_)) => Rejected::BadCertificate,
        _ => Rejected::Handshake,
    }
}
