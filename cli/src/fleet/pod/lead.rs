//! The pod of index 0: coordinator, client and node in one process, until the results are in place.
//!
//! The client speaks to the coordinator over memory, so that no pod holds a client's certificate; the node over the
//! network like all others, since others fetch from it. What is acknowledged lies in the state folder: the next pod of
//! this index goes on from there.

use halfstep_agent::{DaemonError, DaemonOptions, Drain, NodeDaemon};
use halfstep_coordinator::jobs::{Collected, collect};
use halfstep_coordinator::service::{Coordinator, CoordinatorOptions};
use halfstep_coordinator::store::StoreError;
use halfstep_coordinator::{CoordinatorError, JobConfig, check_target};
use halfstep_proto::{Listener, Role, Transport};
use tokio::task::JoinHandle;

use super::PodArgs;
use super::placed::placed;
use crate::answers::Progress;
use crate::args::ShowArgs;
use crate::commands::{mode, show_outcome, with_file};
use crate::config::RunConfig;
use crate::exit::{CliError, Exit};
use crate::fleet::connect::{Line, runtime, transport, unusable};
use crate::fleet::coordinator::{look_after, timing};
use crate::fleet::node::{ended, open, spill, tell};
use crate::fleet::submit::{end_of, submit_over};
use crate::fleet::{Again, Follower, Shutdown, fetch_into};
use crate::observe::{Observed, describe, say};
use crate::options::JobOptions;
use crate::render::progress::Renderer;
use crate::results;

/// Where the client finds the coordinator.
const MEMORY: &str = "coordinator";

/// Takes up the job and sees it through. Layers that were kept are a success: trying again would keep them again.
///
/// # Errors
/// What ended the job, with its exit code; interrupted when it was asked to stop or cannot go on; bad configuration when
/// pods of this index have failed too often.
pub(super) fn lead(arguments: PodArgs) -> Result<Exit, CliError> {
    let shutdown = Shutdown::listen(Again::Ignored)?;
    let state = arguments.state_dir.clone().unwrap_or_default();
    let observed = Observed::of(&arguments.observe, vec![("state", state.clone()), spill(&arguments.work)])?;
    describe("coordinator", "", "");
    halfstep_coordinator::service::describe_metrics();
    halfstep_agent::describe_metrics();
    give_up(&arguments)?;
    let job = job(&arguments)?;
    let taken = check_target(&job.output, job.force).err().map(CliError::from);
    let collected = collect(&job)?;
    let mut options = CoordinatorOptions::new(state);
    options.timing = timing(&arguments.times);
    // A job that is refused does not push another out.
    options.only = taken.is_none().then_some(collected.id);
    let transport = transport(&arguments.security, Role::Coordinator)?;
    let show = ShowArgs { json: arguments.json, quiet: false };
    let renderer = Renderer::new(mode(show));
    let runtime = runtime()?;
    let output = job.output.clone();
    let ran = runtime.block_on(async {
        let events = |event: Progress| renderer.event(&event);
        let task = Task { job, collected, taken, events: &events };
        let listener = transport.listen(&arguments.listen.to_string()).await.map_err(unusable)?;
        let led = Led::start(options, listener, arguments).await?;
        observed.health.started();
        let pulse = led.coordinator.pulse();
        tokio::select! {
            ran = led.see_through(task, &shutdown) => ran,
            never = look_after(&pulse, &observed.health) => match never {},
        }
    });
    runtime.shutdown_background();
    renderer.finish();
    let exit = ran?;
    show_outcome(&results::read(&output)?, show)?;
    Ok(exit)
}

/// The pods of this index are limited in number. The last one ends the whole Job, which would wait for ever without it.
fn give_up(arguments: &PodArgs) -> Result<(), CliError> {
    let (failed, limit) = (arguments.failures, arguments.failures_max);
    if failed < limit {
        return Ok(());
    }
    let message =
        format!("the pod of index 0 has failed {failed} times, expected less than {limit} failures");
    Err(CliError::configuration(message)
        .hint("the logs of the pods before say why; started anew, the job goes on from its state folder"))
}

fn job(arguments: &PodArgs) -> Result<JobConfig, CliError> {
    let file = arguments.config.as_deref();
    let config = RunConfig::resolve(with_file(JobOptions::default(), file)?, arguments.force)?;
    config.require_output()?;
    if config.rounding.choose_partition {
        let message = "partition `auto`: no node is there yet to choose a partition for";
        return Err(CliError::configuration(message)
            .hint("name one in the job file; `halfstep plan --nodes N` compares them"));
    }
    Ok(config.to_job())
}

/// What is to be done.
struct Task<'a> {
    job: JobConfig,
    collected: Collected,
    /// Why results cannot be placed, unless they are there already.
    taken: Option<CliError>,
    events: &'a (dyn Fn(Progress) + Sync),
}

impl Task<'_> {
    async fn run(self, line: &Line, shutdown: &Shutdown) -> Result<Exit, CliError> {
        let (job, id) = (self.job, self.collected.id);
        if let Some(error) = &self.taken
            && !placed(line, id, &job.output).await?
        {
            return Err(error.clone());
        }
        let id = submit_over(line, &self.collected, shutdown).await?;
        let end = Follower::new(self.events, None, job.output.clone()).follow(line, id, shutdown).await?;
        end_of(&end)?;
        if self.taken.is_none() {
            fetch_into(line, id, &job.output, job.force).await?;
        }
        let (solved, kept, failed, seconds) = (end.solved, end.kept, end.failed, end.seconds);
        (self.events)(Progress::Summary { solved, kept, failed, seconds, output: job.output });
        let failed = end.exit == u32::from(Exit::SomeFailed.code());
        Ok(if failed { Exit::SomeFailed } else { Exit::Solved })
    }
}

/// What runs in this pod.
struct Led {
    coordinator: Coordinator,
    line: Line,
    drain: Drain,
    /// None if it leaves the work to others.
    node: Option<JoinHandle<Result<(), DaemonError>>>,
}

impl Led {
    async fn start(
        options: CoordinatorOptions,
        listener: Listener,
        arguments: PodArgs,
    ) -> Result<Self, CliError> {
        let memory = Transport::memory();
        let inner = memory.listen(MEMORY).await.map_err(CliError::internal)?;
        let address = listener.address();
        let node = match arguments.coordinate_only {
            true => None,
            false => Some(node(arguments, &address)?),
        };
        let coordinator =
            Coordinator::start(options, vec![listener, inner], Vec::new()).await.map_err(unstarted)?;
        say(&format!("Listening on {address}"));
        coordinator.resuming().iter().for_each(|job| say(&format!("Resuming {job}")));
        let drain = Drain::new();
        let node = node.map(|node| tokio::spawn(node.run(drain.clone(), |event| tell(&event))));
        let line = Line::new(&memory.connector(MEMORY, Role::Coordinator));
        Ok(Self { coordinator, line, drain, node })
    }

    async fn see_through(mut self, task: Task<'_>, shutdown: &Shutdown) -> Result<Exit, CliError> {
        let stopped = |why: &str| {
            let what = "what was acknowledged is in the state folder";
            CliError::new(Exit::Interrupted, format!("{why}; {what}"))
        };
        let ran = tokio::select! {
            ran = task.run(&self.line, shutdown) => ran,
            () = shutdown.asked() => Err(stopped("the pod was asked to stop")),
            () = self.coordinator.failed() => Err(stopped("the coordinator cannot go on")),
            error = ended_early(&mut self.node) => Err(error),
        };
        self.drain.begin("the pod of index 0 ends");
        if let Some(node) = self.node {
            // Why it ended does not matter any more.
            let _ = node.await;
        }
        self.coordinator.stop().await;
        ran
    }
}

/// A node of this pod, with its devices.
fn node(arguments: PodArgs, coordinator: &str) -> Result<NodeDaemon, CliError> {
    let host = arguments.peers.of(arguments.index);
    let port = coordinator.rsplit_once(':').map_or("", |(_, port)| port);
    let options = DaemonOptions {
        name: host.clone(),
        coordinator: format!("{host}:{port}"),
        transport: transport(&arguments.security, Role::Node)?,
        listen: arguments.serve.to_string(),
        advertise: Some(host),
    };
    Ok(NodeDaemon::new(open(arguments.work)?, options))
}

/// Returns only if there is a node and it ends by itself. One that was drained leaves the work to the other pods.
async fn ended_early(node: &mut Option<JoinHandle<Result<(), DaemonError>>>) -> CliError {
    let Some(running) = node else { return std::future::pending().await };
    let ran = running.await;
    *node = None;
    match ran {
        Ok(Ok(())) => std::future::pending().await,
        Ok(Err(error)) => ended(error),
        Err(error) => CliError::internal(format!("the node of this pod: {error}")),
    }
}

/// A state folder that another still holds is free later: file systems on the network keep locks of the dead for a while.
fn unstarted(error: CoordinatorError) -> CliError {
    match &error {
        CoordinatorError::Store(StoreError::InUse { .. }) => CliError::new(Exit::Interrupted, error),
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn a_state_folder_in_use_is_tried_again_and_one_that_cannot_be_read_is_not() {
        let in_use = StoreError::InUse { folder: PathBuf::from("state"), holder: None };
        assert_eq!(unstarted(in_use.into()).exit, Exit::Interrupted);
        let broken = StoreError::Database { path: PathBuf::from("state.redb"), problem: "cut off".into() };
        assert_eq!(unstarted(broken.into()).exit, Exit::BadInput);
    }
}
