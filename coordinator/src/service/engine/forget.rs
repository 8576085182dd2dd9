//! Jobs that are over are forgotten: when somebody says so, or when there are more than are to be kept. Roundings that a
//! job has left uncommitted go when it is over.

use super::Engine;
use crate::jobs::{Orphans, forget, remove_orphans};
use crate::store::Change;
use halfstep_work::JobId;
use std::sync::Arc;
use tonic::Status;

impl Engine {
    /// Removes a job with its results and whatever only it uses; returns the bytes of its files. Nothing is committed
    /// meanwhile, so that no artefact comes into use that is about to go.
    pub(super) async fn forget(&mut self, id: JobId) -> Result<u64, Status> {
        let record = self.known(id)?.record.clone();
        if !record.stage.is_over() {
            let why =
                format!("job {id}: is not over, expected a job that is; `halfstep cancel {id}` ends it");
            return Err(Status::failed_precondition(why));
        }
        let (store, artefacts) = (Arc::clone(&self.store), Arc::clone(&self.artefacts));
        let forgotten = tokio::task::spawn_blocking(move || forget(&store, &artefacts, &record)).await;
        let forgotten = forgotten.map_err(|e| Status::internal(format!("forgetting job {id}: {e}")))?;
        let bytes = forgotten.map_err(|error| Status::unavailable(error.to_string()))?;
        // Its end may still wait for a disk that refuses.
        self.unwritten.retain(|change| !matches!(change, Change::Job(record) if record.id == id));
        self.jobs.remove(&id);
        tracing::info!(job = %id, bytes, "job forgotten");
        Ok(bytes)
    }

    /// Roundings that came and were not committed. One whose outcome is still on its way is uploaded again.
    pub(super) async fn remove_orphans(&self) {
        let (store, artefacts) = (Arc::clone(&self.store), Arc::clone(&self.artefacts));
        let remove = move || remove_orphans(&store, &artefacts, Orphans::Roundings);
        match tokio::task::spawn_blocking(remove).await {
            Ok(Ok((0, _))) => {}
            Ok(Ok((count, bytes))) => tracing::info!(count, bytes, "uncommitted roundings were removed"),
            Ok(Err(error)) => tracing::warn!(%error, "uncommitted roundings cannot be removed"),
            Err(error) => tracing::error!(%error, "uncommitted roundings were not removed"),
        }
    }

    /// The oldest jobs that are over, beyond the number that is kept.
    pub(super) async fn forget_old(&mut self) {
        let Some(keep) = self.keep_jobs else { return };
        let mut over: Vec<(u64, JobId)> = self
            .jobs
            .values()
            .filter(|known| known.record.stage.is_over())
            .map(|known| (known.record.order, known.record.id))
            .collect();
        over.sort_unstable();
        for (_, id) in &over[..over.len().saturating_sub(keep)] {
            if let Err(status) = self.forget(*id).await {
                tracing::warn!(job = %id, why = status.message(), "an old job cannot be forgotten");
            }
        }
    }
}
