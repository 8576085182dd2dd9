//! `quantize`: a coordinator and a node in this process, joined by memory instead of a network, and a client of theirs.
//!
//! The same services, messages and files as on a fleet. The coordinator keeps its state in a hidden folder beside the
//! output, so that a run that was interrupted or killed goes on where it was when the same command is given again; the
//! folder goes when the results are there. Not here: planning, scheduling and writing (`coordinator`), computing
//! (`agent`).

use std::fs;
use std::path::{Path, PathBuf};

use halfstep_agent::{LocalNode, NodeOptions};
use halfstep_coordinator::jobs::collect;

use crate::answers::{Progress, QuantizeOutcome};
use crate::cluster::Cluster;
use crate::config::{Resources, RunConfig};
use crate::exit::{CliError, Exit};
use crate::fleet::{Again, Follower, Shutdown, end_of, fetch_into, submit_over};
use crate::results;
use crate::{devices, engine, in_place};

/// Quantizes a network.
///
/// # Errors
/// Whatever stops the whole job; a layer that fails is part of the outcome.
pub(crate) fn quantize(
    config: &RunConfig,
    events: &(dyn Fn(Progress) + Sync),
) -> Result<QuantizeOutcome, CliError> {
    let job = config.to_job();
    if let Some((id, outcome)) = in_place::look(&job, events)? {
        in_place::remove_state(&StateFolder::path_beside(&job.output), id);
        return Ok(outcome);
    }
    let collected = collect(&job)?;
    let node = node(&config.resources)?;
    let state = StateFolder::beside(&job.output)?;
    let threads = match halfstep_work::Node::describe(&node).slots {
        1 => "1 thread".to_owned(),
        slots => format!("{slots} threads"),
    };
    let workers = devices::workers(threads, node.devices());
    let shutdown = Shutdown::listen(Again::Ends)?;
    let runtime = crate::fleet::runtime()?;
    let ran = runtime.block_on(async {
        let cluster = Cluster::start(&state.path, collected.id, node).await?;
        let line = cluster.line();
        let work = async {
            let id = submit_over(&line, &collected, &shutdown).await?;
            let mut follower = Follower::new(events, Some(workers), job.output.clone());
            let end = follower.follow(&line, id, &shutdown).await?;
            end_of(&end)?;
            fetch_into(&line, id, &job.output, job.force).await?;
            Ok(end)
        };
        let full = cluster.refused_by_disk();
        let ran: Result<_, CliError> = tokio::select! {
            ran = work => ran,
            what = full => Err(CliError::bad_input(what)),
        };
        cluster.stop().await;
        ran
    });
    runtime.shutdown_background();
    let end = match ran {
        Ok(end) => end,
        Err(error) => return Err(state.after(error)),
    };
    state.remove();
    let (solved, kept, failed, seconds) = (end.solved, end.kept, end.failed, end.seconds);
    events(Progress::Summary { solved, kept, failed, seconds, output: job.output.clone() });
    results::read(&job.output)
}

/// The node of this process.
///
/// # Errors
/// Bad input if the ONNX Runtime library cannot be loaded, bad configuration if the device cannot be used.
pub(crate) fn node(resources: &Resources) -> Result<LocalNode, CliError> {
    let threads = resources.threads.unwrap_or_else(engine::cores);
    let options = NodeOptions {
        threads,
        memory_budget: usize::try_from(resources.memory_budget.0).unwrap_or(usize::MAX),
        spill_dir: resources.spill_dir.clone().unwrap_or_else(std::env::temp_dir),
    };
    let devices = devices::open(&resources.device)?;
    Ok(LocalNode::new(engine::open(resources.onnxruntime.as_deref())?, options).solving_on(devices))
}

/// Where an interrupted run leaves what it has.
struct StateFolder {
    path: PathBuf,
    /// Whether it was there before: then an earlier run was interrupted.
    resumed: bool,
}

impl StateFolder {
    /// `.NAME.halfstep` beside the output.
    fn beside(output: &Path) -> Result<Self, CliError> {
        let path = Self::path_beside(output);
        let resumed = path.exists();
        fs::create_dir_all(&path).map_err(|error| {
            CliError::bad_input(format!("output `{}`: cannot be written beside: {error}", output.display()))
                .hint("name a folder in a place that you may write to")
        })?;
        Ok(Self { path, resumed })
    }

    fn path_beside(output: &Path) -> PathBuf {
        let name =
            output.file_name().map_or_else(|| "out".into(), |name| name.to_string_lossy().into_owned());
        output.with_file_name(format!(".{name}.halfstep"))
    }

    /// What was solved stays only for a run that can go on.
    fn after(self, error: CliError) -> CliError {
        if error.exit == Exit::Interrupted {
            return CliError::new(Exit::Interrupted, "interrupted; no results were written").hint(format!(
                "the same command goes on where this one was, from `{}`",
                self.path.display()
            ));
        }
        if !self.resumed {
            self.remove();
        }
        error
    }

    /// A folder that cannot be removed does no harm.
    fn remove(self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
