//! This node's data plane: state it holds, for other nodes, and probes, by which they see how fast their line is.
//!
//! Not here: chunks and checksums (`proto::data`), who may ask (`proto::roles`).

use super::run::Shared;
use halfstep_proto::data::{Blob, ReplyStream, probe, serve, status_of};
use halfstep_proto::wire::artefacts_server::Artefacts;
use halfstep_proto::{BlobName, Fetch, wire};
use halfstep_work::{Node, SourceError};
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// See the module.
#[derive(Clone)]
pub(super) struct HeldState(pub(super) Arc<Shared>);

#[tonic::async_trait]
impl Artefacts for HeldState {
    type FetchStream = ReplyStream;

    async fn fetch(&self, request: Request<wire::FetchRequest>) -> Result<Response<ReplyStream>, Status> {
        let fetch = Fetch::asked(&request)?;
        if let BlobName::Probe(bytes) = fetch.name {
            let blob = tokio::task::spawn_blocking(move || probe(bytes)).await;
            let blob = blob.map_err(|error| Status::internal(error.to_string()))?;
            return Ok(Response::new(serve(blob, &fetch, &self.0.traffic)?));
        }
        let BlobName::Held(wanted) = fetch.name.clone() else {
            return Err(Status::not_found("a node has only the state it holds"));
        };
        if self.0.open_job() != Some(fetch.job) {
            return Err(Status::not_found(format!("job {}: not open on this node", fetch.job)));
        }
        let node = Arc::clone(&self.0.node);
        let blob = tokio::task::spawn_blocking(move || node.serve(&wanted).map(Blob::new)).await;
        let blob = blob.map_err(|error| Status::internal(error.to_string()))?;
        let blob = blob.map_err(|failure| status_of(&SourceError::new(failure.class, failure.message)))?;
        Ok(Response::new(serve(blob, &fetch, &self.0.traffic)?))
    }

    async fn upload(
        &self,
        _: Request<Streaming<wire::UploadRequest>>,
    ) -> Result<Response<wire::UploadReply>, Status> {
        Err(Status::unimplemented("a node keeps no uploads"))
    }
}
