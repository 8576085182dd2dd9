//! Opening and closing jobs, one after the other, beside the stream that asks for it.
//!
//! Not here: what an open job is (`job`).

use super::apart::apart;
use super::run::Shared;
use super::shared_model::SharedModel;
use super::source::RemoteSource;
use crate::failure;
use halfstep_proto::{BlobHash, job_from_wire, wire};
use halfstep_work::{Failure, Inventory, JobId, Node, Source};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use tokio::sync::mpsc;

/// What the coordinator wants of jobs, and where the answer goes.
pub(super) enum JobOrder {
    /// Open it; the answer is sent there.
    Open(wire::OpenJob, mpsc::Sender<wire::NodeMessage>),
    /// Close it.
    Close(JobId),
}

/// Follows orders until there are no more.
pub(super) async fn follow(shared: Arc<Shared>, mut orders: mpsc::UnboundedReceiver<JobOrder>) {
    while let Some(order) = orders.recv().await {
        let following = Arc::clone(&shared);
        let shared = Arc::clone(&shared);
        let answered = apart("job", move || match order {
            JobOrder::Open(order, answer) => Some((open(&shared, order), answer)),
            JobOrder::Close(job) => {
                close(&shared, job);
                None
            }
        });
        match answered.await {
            Ok(Some((opened, answer))) => {
                let job = job_from_wire(&opened.job).ok().filter(|_| opened.failure.is_none());
                let body = Some(wire::node_message::Body::Opened(opened));
                // Fails if the stream is gone; the next one asks again.
                let sent = answer.send(wire::NodeMessage { body }).await;
                if let Some(job) = job.filter(|_| sent.is_ok()) {
                    following.told(job);
                }
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "a job was neither opened nor closed"),
        }
    }
}

/// A panic below is a bug, but the coordinator must not wait for an answer that never comes.
fn open(shared: &Shared, order: wire::OpenJob) -> wire::Opened {
    let job = order.job.clone();
    let opened = catch_unwind(AssertUnwindSafe(|| try_open(shared, &order)));
    let opened =
        opened.unwrap_or_else(|_| Err(failure::internal("the node panicked when it opened the job")));
    let (inventory, failure) = match opened {
        Ok(inventory) => (inventory, None),
        Err(failure) => {
            tracing::warn!(%failure, "job not opened");
            (Inventory::default(), Some(failure))
        }
    };
    wire::Opened { job, inventory: Some((&inventory).into()), failure: failure.map(wire::Failure::from) }
}

fn try_open(shared: &Shared, order: &wire::OpenJob) -> Result<Inventory, Failure> {
    let job = job_from_wire(&order.job).map_err(failure::internal)?;
    if shared.open_job() != Some(job) {
        if let Some(other) = shared.open_job() {
            close(shared, other);
        }
        let hash = BlobHash::try_from(order.plan.as_slice()).map_err(failure::internal)?;
        let model = SharedModel::new(&order.model_path, order.fold_batch_norm);
        let source = RemoteSource::new(job, Arc::clone(&shared.lines), model, shared.node.memory_budget());
        let plan = Arc::new(source.plan(hash).map_err(failure::source)?);
        let source: Arc<dyn Source> = Arc::new(source);
        shared.node.open(plan, source)?;
        shared.set_open_job(Some(job));
    }
    Ok(Inventory { leases: shared.leases.of(job), ..shared.node.inventory() })
}

/// Forgets a job, if it is the open one.
fn close(shared: &Shared, job: JobId) {
    if shared.open_job() == Some(job) {
        shared.leases.abandon(|lease| lease.job == job);
        shared.set_open_job(None);
        shared.node.close();
        tracing::info!(%job, "job closed");
    }
}
