//! Carries of a node that leaves: fetched one after the other, each answered for, until all are here or it is too late.
//!
//! Not here: who takes over what (`coordinator::dispatch`), the carries themselves (`replay`).

use super::run::Shared;
use halfstep_proto::job_to_wire;
use halfstep_proto::wire::node_message::Body;
use halfstep_proto::wire::{Carry, NodeMessage, TakenOver};
use halfstep_work::{Held, Holding, JobId};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Later than this the node has left.
const LIMIT: Duration = Duration::from_secs(3);

/// Blocks; for a thread that may wait.
pub(super) fn take_over(shared: &Shared, job: JobId, carries: &[Holding], out: &mpsc::Sender<NodeMessage>) {
    let begun = Instant::now();
    let mut came = 0;
    for holder in carries {
        let Held::Carry { range, segment, shard } = holder.held else { continue };
        if begun.elapsed() > LIMIT || shared.open_job() != Some(job) || shared.drain.asked().is_some() {
            break;
        }
        let taken = shared.node.take_over(holder);
        if let Err(failure) = &taken {
            tracing::warn!(address = holder.address, %failure, "a carry is left behind");
        }
        came += usize::from(taken.is_ok());
        let carry = Some(Carry { range: range.0, segment: segment.0, shard: shard.0 });
        let taken = TakenOver { job: job_to_wire(job), carry, taken: taken.is_ok() };
        // Fails when the stream is gone: then nobody waits.
        if out.blocking_send(NodeMessage { body: Some(Body::TakenOver(taken)) }).is_err() {
            break;
        }
    }
    let (asked, seconds) = (carries.len(), begun.elapsed().as_secs_f64());
    tracing::info!(came, asked, seconds, "carries taken over from a node that leaves");
}
