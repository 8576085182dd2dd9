//! Serving gRPC: refuses calls that a role may not make, routes the others to services, bounds what they may take.
//!
//! A small router of our own instead of tonic's, which brings a web framework, and so that no service can be reached
//! around the table of roles.

use crate::roles::{TABLE, may_call};
use crate::telemetry::{self, Rejected};
use crate::{Listener, Peer, TransportError};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, http};
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::{Code, Status};
use tower::util::BoxCloneSyncService;
use tower::{Service, ServiceExt};

type Request = http::Request<Body>;
type Response = http::Response<Body>;
type Route = BoxCloneSyncService<Request, Response, Infallible>;

/// Pings, and how long an answer may take.
const PING: Duration = Duration::from_secs(10);
const PING_ANSWER: Duration = Duration::from_secs(30);
/// Bytes of the headers of a request.
const HEADERS_MAX: u32 = 16 << 10;
/// Bytes that may be on the way unread: one stream, one connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// The gRPC services of one port. Messages of more than 4 MiB are refused (tonic's own limit).
#[derive(Clone, Default)]
pub struct Services {
    routes: BTreeMap<&'static str, Route>,
}

impl Services {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more: a generated server, or any other gRPC service.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<Request, Response = Response, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes.insert(S::NAME, BoxCloneSyncService::new(service));
        self
    }

    /// Answers at `listener` until `shutdown`; then accepts no more and waits for the calls that go on.
    ///
    /// # Errors
    /// `Listen` if the port cannot be served any more.
    pub async fn serve(
        self,
        listener: Listener,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), TransportError> {
        let (address, limits) = (listener.address(), listener.limits());
        let per_connection = u32::try_from(limits.requests_per_connection).unwrap_or(u32::MAX);
        let server = Server::builder()
            .concurrency_limit_per_connection(limits.requests_per_connection)
            .max_concurrent_streams(per_connection)
            .http2_keepalive_interval(Some(PING))
            .http2_keepalive_timeout(Some(PING_ANSWER))
            .http2_max_header_list_size(HEADERS_MAX)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let failed = |error| TransportError::Listen { address, source: std::io::Error::other(error) };
        server.serve_with_incoming_shutdown(self, listener.incoming(), shutdown).await.map_err(failed)
    }
}

impl Services {
    /// The service that answers, if the peer may call it.
    fn admit(&self, request: &Request) -> Result<Route, Status> {
        let path = request.uri().path();
        let peer: &Peer = request.extensions().get().ok_or_else(Peer::nobody)?;
        may_call(peer, path).inspect_err(|refused| {
            telemetry::rejected(Rejected::Role);
            tracing::warn!(%peer, path, "call refused: {}", refused.message());
        })?;
        let name = path.strip_prefix('/').and_then(|path| path.split_once('/')).map(|(name, _)| name);
        let route = name.and_then(|name| self.routes.get(name)).cloned();
        route.ok_or_else(|| Status::unimplemented(format!("nothing answers to `{path}` at this address")))
    }
}

/// The call as the table of roles has it: of a fixed list, whatever a peer asks for.
fn method_of(path: &str) -> &'static str {
    let row = TABLE.iter().find(|(row, _)| *row == path);
    row.and_then(|(row, _)| row.strip_prefix('/')).unwrap_or("unknown")
}

impl Service<Request> for Services {
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let (method, began) = (method_of(request.uri().path()), Instant::now());
        let admitted = self.admit(&request);
        Box::pin(async move {
            let response = match admitted {
                Ok(route) => route.oneshot(request).await?,
                Err(refused) => refused.into_http(),
            };
            // A refusal is all header; what goes wrong after the first part of an answer is not seen here.
            let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
            telemetry::answered(method, code, began.elapsed());
            Ok(response)
        })
    }
}
