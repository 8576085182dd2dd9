//! What people ask a coordinator: its jobs, its nodes, and to stop or fetch one.

use halfstep_proto::wire::{self, JobState, JobStatus};
use halfstep_proto::{hello, job_to_wire};
use serde_json::json;

use super::args::{CancelArgs, ConnectArgs, FetchArgs, ForgetArgs, NodesArgs, StatusArgs, WatchArgs};
use super::connect::{Line, job_id, runtime};
use super::fetch::fetch_into;
use super::follow::Follower;
use super::present::nodes_of;
use super::submit::end_of;
use super::{Again, Shutdown};
use crate::commands::{mode, print, show};
use crate::exit::{CliError, Exit};
use crate::render::Table;
use crate::render::progress::Renderer;
use crate::values::{ByteSize, LinkSpeed};

/// Lists jobs.
///
/// # Errors
/// If the coordinator cannot be asked or has no such job.
pub(crate) fn status(arguments: StatusArgs) -> Result<Exit, CliError> {
    let jobs = ask(&arguments.connect, async |line: &Line| match &arguments.job {
        Some(text) => {
            let reply = line.jobs.clone().status(request(text)?).await;
            Ok(vec![reply.map_err(|status| line.refused(&status))?.into_inner()])
        }
        None => {
            let reply = line.jobs.clone().list(wire::ListRequest { hello: Some(hello()) }).await;
            Ok(reply.map_err(|status| line.refused(&status))?.into_inner().jobs)
        }
    })?;
    let rows: Vec<serde_json::Value> = jobs.iter().map(job_json).collect();
    show(arguments.json, &rows, |_| jobs_table(&jobs))
}

/// Follows a job; its exit code is the job's.
///
/// # Errors
/// If the coordinator has no such job, or a signal came.
pub(crate) fn watch(arguments: WatchArgs) -> Result<Exit, CliError> {
    let id = job_id(&arguments.job)?;
    let renderer = Renderer::new(mode(arguments.show));
    let shutdown = Shutdown::listen(Again::Ends)?;
    let show = |event| renderer.event(&event);
    let end = ask(&arguments.connect, async |line: &Line| {
        Follower::new(&show, None, "results".into()).follow(line, id, &shutdown).await
    });
    renderer.finish();
    let end = end?;
    end_of(&end)?;
    let exit = Exit::ALL.into_iter().find(|exit| u32::from(exit.code()) == end.exit);
    Ok(exit.unwrap_or(Exit::Internal))
}

/// Stops a job.
///
/// # Errors
/// If the coordinator has no such job.
pub(crate) fn cancel(arguments: CancelArgs) -> Result<Exit, CliError> {
    let job = ask(&arguments.connect, async |line: &Line| {
        let reply = line.jobs.clone().cancel(request(&arguments.job)?).await;
        reply.map(tonic::Response::into_inner).map_err(|status| line.refused(&status))
    })?;
    print(&jobs_table(&[job]))?;
    Ok(Exit::Solved)
}

/// Removes a job that is over.
///
/// # Errors
/// If the coordinator has no such job or it is not over.
pub(crate) fn forget(arguments: ForgetArgs) -> Result<Exit, CliError> {
    let freed = ask(&arguments.connect, async |line: &Line| {
        let reply = line.jobs.clone().forget(request(&arguments.job)?).await;
        Ok(reply.map_err(|status| line.refused(&status))?.into_inner().bytes_freed)
    })?;
    print(&format!("{} forgotten, {} freed\n", arguments.job, ByteSize(freed)))?;
    Ok(Exit::Solved)
}

/// Fetches results.
///
/// # Errors
/// If there is no such job, it is not finished, or the results cannot be written.
pub(crate) fn fetch(arguments: FetchArgs) -> Result<Exit, CliError> {
    let id = job_id(&arguments.job)?;
    ask(&arguments.connect, async |line: &Line| {
        fetch_into(line, id, &arguments.output, arguments.force).await
    })?;
    Ok(Exit::Solved)
}

/// Lists nodes.
///
/// # Errors
/// If the coordinator cannot be asked.
pub(crate) fn nodes(arguments: NodesArgs) -> Result<Exit, CliError> {
    let reply = ask(&arguments.connect, async |line: &Line| nodes_of(line, arguments.measure).await)?;
    let rows: Vec<serde_json::Value> = reply.nodes.iter().map(node_json).collect();
    show(arguments.json, &rows, |_| nodes_table(&reply) + &fenced_line(&reply))
}

pub(super) fn ask<T>(
    connect: &ConnectArgs,
    question: impl AsyncFnOnce(&Line) -> Result<T, CliError>,
) -> Result<T, CliError> {
    runtime()?.block_on(async { question(&Line::open(connect)?).await })
}

fn request(job: &str) -> Result<wire::JobRequest, CliError> {
    Ok(wire::JobRequest { hello: Some(hello()), job: job_to_wire(job_id(job)?) })
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn state(job: &JobStatus) -> &'static str {
    match job.state() {
        JobState::Queued => "queued",
        JobState::Running => "running",
        JobState::Finished => "finished",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
        JobState::Unspecified => "unknown",
    }
}

pub(super) fn job_json(job: &JobStatus) -> serde_json::Value {
    json!({
        "job": hex(&job.job),
        "state": state(job),
        "detail": job.detail,
        "model": job.model,
        "stages": job.stages,
        "stages_done": job.stages_done,
        "layers": job.layers,
        "layers_done": job.layers_done,
        "nodes": job.nodes,
        "exit": job.exit,
        "submitted_unix_ms": job.submitted_unix_ms,
        "fenced_nodes": job.fenced_nodes,
        "fenced_results": job.fenced_results,
    })
}

fn jobs_table(jobs: &[JobStatus]) -> String {
    let mut table = Table::new(&["<job", "<state", "stages", "layers", "nodes", "fenced", "<model", "<"]);
    for job in jobs {
        table.row([
            hex(&job.job),
            state(job).into(),
            format!("{}/{}", job.stages_done, job.stages),
            format!("{}/{}", job.layers_done, job.layers),
            job.nodes.to_string(),
            (job.fenced_nodes + job.fenced_results).to_string(),
            job.model.clone(),
            job.detail.clone(),
        ]);
    }
    if jobs.is_empty() { "no jobs\n".into() } else { table.to_string() }
}

fn node_json(node: &wire::NodeStatus) -> serde_json::Value {
    let description = node.description.clone().unwrap_or_default();
    json!({
        "node": node.node,
        "name": description.name,
        "slots": description.slots,
        "device": description.device,
        "engine": description.engine,
        "address": node.address,
        "state": node.state,
        "leases": node.leases,
        "held_bytes": node.held_bytes,
        "bytes_sent": node.bytes_sent,
        "bytes_fetched": node.bytes_fetched,
        "tasks_done": node.tasks_done,
        "detail": node.detail,
        "link": node.line.as_ref().map(|line| json!({
            "from": line.from_name,
            "from_node": line.from,
            "bytes_per_second": (line.bytes_per_second > 0).then_some(line.bytes_per_second),
            "failed": line.failed,
            "age_seconds": line.age_ms as f64 / 1e3,
        })),
    })
}

fn nodes_table(reply: &wire::NodesReply) -> String {
    let nodes = &reply.nodes;
    let mut table = Table::new(&[
        "node", "<name", "<state", "slots", "leases", "tasks", "held", "sent", "fetched", "link", "<device",
        "<",
    ]);
    for node in nodes {
        let description = node.description.clone().unwrap_or_default();
        table.row([
            node.node.to_string(),
            description.name,
            node.state.clone(),
            description.slots.to_string(),
            node.leases.to_string(),
            node.tasks_done.to_string(),
            ByteSize(node.held_bytes).to_string(),
            ByteSize(node.bytes_sent).to_string(),
            ByteSize(node.bytes_fetched).to_string(),
            link(node.line.as_ref()),
            description.device,
            node.detail.clone(),
        ]);
    }
    if nodes.is_empty() { "no nodes\n".into() } else { table.to_string() }
}

/// How fast a node receives, if that was measured.
fn link(line: Option<&wire::NodeLine>) -> String {
    match line {
        None => "-".into(),
        Some(line) if line.bytes_per_second == 0 => "failed".into(),
        Some(line) => LinkSpeed(line.bytes_per_second as f64).to_string(),
    }
}

/// What became of nodes that had been given up; nothing if there were none.
fn fenced_line(reply: &wire::NodesReply) -> String {
    match (reply.fenced_nodes, reply.fenced_results) {
        (0, 0) => String::new(),
        (nodes, results) => format!(
            "{nodes} nodes fenced, {results} of their results refused since the coordinator started\n"
        ),
    }
}
