//! Whether results are in their place already: a pod can die between placing them and saying so.

use std::path::{Path, PathBuf};

use halfstep_coordinator::FileRecord;
use halfstep_proto::{BlobHash, hello, job_to_wire, wire};
use halfstep_work::JobId;

use crate::exit::CliError;
use crate::fleet::connect::Line;
use crate::fleet::fetch::plain;

/// Whether `output` holds every file of the results of `job`, byte for byte; false if it has no results yet.
///
/// # Errors
/// If the coordinator does not answer.
pub(super) async fn placed(line: &Line, job: JobId, output: &Path) -> Result<bool, CliError> {
    let request = wire::JobRequest { hello: Some(hello()), job: job_to_wire(job) };
    let files = match line.jobs.clone().results(request).await {
        Ok(reply) => reply.into_inner().files,
        Err(status) if matches!(status.code(), tonic::Code::NotFound | tonic::Code::FailedPrecondition) => {
            return Ok(false);
        }
        Err(status) => return Err(line.refused(&status)),
    };
    let mut expected = Vec::new();
    for file in files {
        let path = output.join(plain(&file.name)?);
        expected.push((path, file.size, BlobHash::try_from(&file.hash[..]).map_err(CliError::internal)?));
    }
    let compared = tokio::task::spawn_blocking(move || expected.into_iter().all(is_there));
    compared.await.map_err(CliError::internal)
}

/// A file that cannot be read is not there.
fn is_there((path, size, hash): (PathBuf, u64, BlobHash)) -> bool {
    let found = FileRecord::of(&path, "");
    found.is_ok_and(|found| found.bytes == size && found.blake3 == hash.to_string())
}
