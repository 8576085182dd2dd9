//! `submit`: gives a coordinator a job, with the files it does not have yet, and follows it if asked to.

use std::path::PathBuf;

use halfstep_coordinator::jobs::{Collected, collect};
use halfstep_coordinator::{JobConfig, check_target};
use halfstep_proto::{BlobHash, hello, job_from_wire, wire};
use halfstep_work::{JobId, Partition};
use tonic::{Code, Status};

use super::args::SubmitArgs;
use super::connect::{Line, is_passing};
use super::fetch::{failed, fetch_into};
use super::follow::{End, Follower};
use super::present::{fleet_of, nodes_of};
use super::{Again, Shutdown};
use crate::answers::Progress;
use crate::commands::{exit_of, mode, print, show_outcome, with_file};
use crate::config::RunConfig;
use crate::exit::{CliError, Exit};
use crate::in_place;
use crate::render::progress::Renderer;
use crate::results;
use crate::survey;
use crate::values::{LinkSpeed, PartitionArg};

/// Between attempts to reach a coordinator that is away.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(500);
/// Offers of a job whose inputs were gone when it was submitted.
const ATTEMPTS: u32 = 3;

/// Runs the command.
///
/// # Errors
/// What stopped it, with its exit code.
pub(crate) fn submit(arguments: SubmitArgs) -> Result<Exit, CliError> {
    let mut config =
        RunConfig::resolve(with_file(arguments.job, arguments.config.as_deref())?, arguments.force)?;
    if arguments.wait {
        config.require_output()?;
    }
    let renderer = Renderer::new(mode(arguments.show));
    let show = |event: Progress| renderer.event(&event);
    if arguments.wait && config.rounding.choose_partition {
        // Which job it will be is not known yet.
        check_target(&config.output.clone().unwrap_or_default(), config.force)?;
    } else if arguments.wait
        && let Some((_, outcome)) = in_place::look(&config.to_job(), &show)?
    {
        renderer.finish();
        show_outcome(&outcome, arguments.show)?;
        return Ok(exit_of(&outcome));
    }
    let shutdown = Shutdown::listen(Again::Ends)?;
    let runtime = super::connect::runtime()?;
    if config.rounding.choose_partition {
        let measure = arguments.link.is_none();
        let asked = async { nodes_of(&Line::open(&arguments.connect)?, measure).await };
        show(choose_partition(&mut config, &runtime.block_on(asked)?.nodes, arguments.link)?);
    }
    let job = config.to_job();
    let result = runtime.block_on(async {
        let line = Line::open(&arguments.connect)?;
        let id = submit_over(&line, &collect(&job)?, &shutdown).await?;
        if !arguments.show.json {
            print(&format!("{id}\n"))?;
        }
        if !arguments.wait {
            return Ok(None);
        }
        let mut follower = Follower::new(&show, None, job.output.clone());
        let end = follower.follow(&line, id, &shutdown).await.map_err(|error| goes_on(error, id))?;
        finish(&line, id, &job, end, &show).await.map(Some)
    });
    renderer.finish();
    let Some(output) = result? else { return Ok(Exit::Solved) };
    let outcome = results::read(&output)?;
    show_outcome(&outcome, arguments.show)?;
    Ok(exit_of(&outcome))
}

/// Takes the partition that suits the nodes that work now; it is part of the job from here on, as if it had been typed,
/// so that neither a restart nor nodes that come later choose again.
fn choose_partition(
    config: &mut RunConfig,
    nodes: &[wire::NodeStatus],
    said: Option<LinkSpeed>,
) -> Result<Progress, CliError> {
    let asked = fleet_of(nodes, said)?;
    let (nodes, link) = (asked.nodes, asked.link.clone());
    let rows = survey::plan(config, Some(asked))?.fleet;
    let taken = rows.into_iter().find_map(|row| Some((row.partition, row.why?)));
    let (text, why) = taken.ok_or_else(|| CliError::internal("no partition was chosen"))?;
    let PartitionArg(partition) = text.parse().map_err(CliError::internal)?;
    config.rounding.partition = partition.ok_or_else(|| CliError::internal("no partition was chosen"))?;
    let warning = match config.rounding.partition {
        Partition::Batches => "",
        _ => "; results are not those of batches",
    };
    Ok(Progress::Chosen { partition: text, nodes, why: why + warning, link })
}

/// Brings the results home, or says why there are none.
async fn finish(
    line: &Line,
    id: JobId,
    job: &JobConfig,
    end: End,
    show: &(dyn Fn(Progress) + Sync),
) -> Result<PathBuf, CliError> {
    end_of(&end)?;
    fetch_into(line, id, &job.output, job.force).await?;
    let (solved, kept, failed, seconds) = (end.solved, end.kept, end.failed, end.seconds);
    show(Progress::Summary { solved, kept, failed, seconds, output: job.output.clone() });
    Ok(job.output.clone())
}

/// A job that ended without results is an error with its exit code.
///
/// # Errors
/// The job's.
pub(crate) fn end_of(end: &End) -> Result<(), CliError> {
    let finished = [Exit::Solved, Exit::SomeKept, Exit::SomeFailed];
    if finished.iter().any(|exit| u32::from(exit.code()) == end.exit) {
        return Ok(());
    }
    let exit =
        Exit::ALL.into_iter().find(|exit| u32::from(exit.code()) == end.exit).unwrap_or(Exit::Internal);
    Err(CliError::new(exit, &end.message))
}

/// Whoever stops waiting should know that the job does not stop.
fn goes_on(error: CliError, id: JobId) -> CliError {
    if error.exit != Exit::Interrupted {
        return error;
    }
    error.hint(format!(
        "the job goes on: `halfstep watch {id}`, `halfstep fetch {id} --output DIR`, `halfstep cancel {id}`"
    ))
}

/// Hands the job over; the same job again is the same id. Waits for a coordinator that is away.
///
/// # Errors
/// For inputs that cannot be read, and what the coordinator refuses.
pub(crate) async fn submit_over(
    line: &Line,
    collected: &Collected,
    shutdown: &Shutdown,
) -> Result<JobId, CliError> {
    loop {
        match hand_over(line, collected).await {
            Ok(id) => return Ok(id),
            Err(Handing::Refused(status)) if is_passing(&status) && !shutdown.is_asked() => {
                tokio::time::sleep(PAUSE).await;
            }
            Err(Handing::Refused(status)) => return Err(line.refused(&status)),
            Err(Handing::Failed(error)) => return Err(error),
        }
    }
}

enum Handing {
    Refused(Status),
    Failed(CliError),
}

impl From<Status> for Handing {
    fn from(status: Status) -> Self {
        Self::Refused(status)
    }
}

/// What was uploaded may be gone when it is submitted: a coordinator that starts removes what no job refers to.
async fn hand_over(line: &Line, collected: &Collected) -> Result<JobId, Handing> {
    let mut attempts = 1..ATTEMPTS;
    loop {
        match offer_and_submit(line, collected).await {
            Err(Handing::Refused(status))
                if status.code() == Code::FailedPrecondition && attempts.next().is_some() => {}
            handed => return handed,
        }
    }
}

async fn offer_and_submit(line: &Line, collected: &Collected) -> Result<JobId, Handing> {
    let files: Vec<wire::InputFile> = collected
        .files
        .iter()
        .map(|file| wire::InputFile {
            role: file.role.text().into(),
            name: file.name.clone(),
            size: file.size,
            hash: file.hash.as_bytes().to_vec(),
            path: file.path.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
        })
        .collect();
    let mut jobs = line.jobs.clone();
    let offer = wire::OfferRequest { hello: Some(hello()), files: files.clone() };
    for missing in jobs.offer(offer).await?.into_inner().missing {
        let known = collected.files.iter().find(|file| file.hash.as_bytes()[..] == missing[..]);
        let Some(path) = known.and_then(|file| file.path.as_ref()) else {
            let hash = BlobHash::try_from(missing.as_slice())
                .map_or_else(|e| e.to_string(), |hash| hash.to_string());
            return Err(Handing::Failed(CliError::internal(format!(
                "coordinator asks for {hash}, which is no input of this job"
            ))));
        };
        line.data.upload_file(path).await.map_err(|error| match error.class {
            halfstep_work::FailureClass::PeerLost => Handing::Refused(Status::unavailable(error.message)),
            _ => Handing::Failed(failed(error)),
        })?;
    }
    let request = wire::SubmitRequest { hello: Some(hello()), spec: collected.spec.clone(), files };
    let reply = jobs.submit(request).await?.into_inner();
    job_from_wire(&reply.job).map_err(|error| Handing::Failed(CliError::internal(error)))
}
