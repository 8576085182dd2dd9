//! How fast this node receives from another one, when the coordinator asks.
//!
//! Not here: how it is measured (`proto::data`), which nodes are asked (`coordinator::links`).

use super::run::Shared;
use halfstep_proto::wire::line_measured::Result as Measured;
use halfstep_proto::wire::node_message::Body;
use halfstep_proto::wire::{LineMeasured, MeasureLine, NodeMessage};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// For one line, connecting included.
const LIMIT: Duration = Duration::from_millis(1800);

/// Measures and answers. Nobody waits for the answer if the stream ends meanwhile.
pub(super) async fn measure(shared: Arc<Shared>, asked: MeasureLine, out: mpsc::Sender<NodeMessage>) {
    let MeasureLine { number, address } = asked;
    let measured = shared.lines.client(&address).measure(LIMIT).await;
    tracing::info!(address, ?measured, "line measured");
    let result = match measured {
        Ok(bytes_per_second) => Measured::BytesPerSecond(bytes_per_second),
        Err(error) => Measured::Failed(error.message),
    };
    let body = Some(Body::Measured(LineMeasured { number, result: Some(result) }));
    let _ = out.send(NodeMessage { body }).await;
}
