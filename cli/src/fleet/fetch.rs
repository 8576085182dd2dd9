//! Brings the results of a job into a folder that appears whole or not at all.
//!
//! Every file is checked against the hash that the coordinator stated; the folder gets its name by a rename.

use std::fs::File;
use std::path::{Component, Path};

use halfstep_coordinator::Staging;
use halfstep_proto::data::FetchedInto;
use halfstep_proto::{BlobHash, BlobName, Fetch, hello, job_to_wire, wire};
use halfstep_work::{FailureClass, JobId, SourceError};

use super::connect::Line;
use crate::exit::{CliError, Exit};

/// Fetches all results of a finished job into `output`.
///
/// # Errors
/// Bad configuration if `output` holds something else; bad input if there is no such job or it is not finished;
/// storage errors. Nothing is visible then.
pub(crate) async fn fetch_into(line: &Line, job: JobId, output: &Path, force: bool) -> Result<(), CliError> {
    let request = wire::JobRequest { hello: Some(hello()), job: job_to_wire(job) };
    let results =
        line.jobs.clone().results(request).await.map_err(|status| line.refused(&status))?.into_inner();
    let staging = Staging::new(output, force)?;
    for file in &results.files {
        let name = plain(&file.name)?;
        let hash = BlobHash::try_from(file.hash.as_slice()).map_err(CliError::internal)?;
        let path = staging.path(name);
        let create =
            |error| CliError::bad_input(format!("result `{}`: cannot be created: {error}", path.display()));
        let fetch = Fetch::new(job, BlobName::Artefact(hash));
        let sink = File::create(&path).map_err(create)?;
        match line.data.fetch_into(fetch, file.size, sink).await.map_err(failed)? {
            FetchedInto::Blob { sink, .. } => sink.sync_all().map_err(create)?,
            FetchedInto::Same | FetchedInto::None => {
                return Err(CliError::internal(format!(
                    "result `{name}`: the coordinator has nothing to send"
                )));
            }
        }
    }
    staging.publish()?;
    Ok(())
}

/// A name from the wire becomes a file only if it is one.
pub(super) fn plain(name: &str) -> Result<&str, CliError> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(_)), None) => Ok(name),
        _ => Err(CliError::internal(format!("result `{name}`: expected a plain file name"))),
    }
}

/// What the data plane said no to.
pub(super) fn failed(error: SourceError) -> CliError {
    let exit = match error.class {
        FailureClass::PeerLost => Exit::Interrupted,
        FailureClass::BadInput | FailureClass::Storage => Exit::BadInput,
        _ => Exit::Internal,
    };
    CliError::new(exit, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_cannot_leave_their_folder() {
        assert_eq!(plain("model.onnx").unwrap(), "model.onnx");
        for name in ["", "..", "../x", "a/b", "/etc/passwd", "."] {
            assert!(plain(name).is_err(), "{name}");
        }
    }
}
