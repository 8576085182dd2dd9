//! `node`: the process that computes.
//!
//! It serves one coordinator after the other where a file says that the coordinator has moved. Not here: taking part
//! (`halfstep_agent`), what belongs to Slurm (`slurm`).

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use halfstep_agent::{
    DaemonError, DaemonEvent, DaemonOptions, Drain, LocalNode, NodeDaemon, describe_metrics,
};
use halfstep_proto::{Role, Transport};
use tokio::sync::watch;

use super::args::{NodeArgs, SecurityArgs, WorkArgs};
use super::connect::{runtime, transport, unusable};
use super::slurm::Slurm;
use super::whereabouts::Whereabouts;
use super::{Again, Shutdown};
use crate::config::{DeviceConfig, Resources, defaults};
use crate::exit::{CliError, Exit};
use crate::observe::{Health, Observed, describe, say};
use crate::values::{ByteSize, DeviceArg};
use crate::{devices, quantize};

/// Works until a signal asks it to stop.
///
/// # Errors
/// Bad configuration for an address or certificates that cannot be used or if the coordinator refuses this node;
/// interrupted if it gives up.
pub(crate) fn node(arguments: NodeArgs) -> Result<Exit, CliError> {
    let shutdown = Shutdown::listen(Again::Ignored)?;
    let observed = Observed::of(&arguments.observe, vec![spill(&arguments.work)])?;
    describe_metrics();
    let slurm = Slurm::of(&arguments.slurm)?;
    let place = Whereabouts::of(&arguments.connect)?;
    let life = Life::new(arguments, place, slurm.as_ref(), observed.health.clone())?;
    let runtime = runtime()?;
    let ended = runtime.block_on(life.live(&shutdown));
    runtime.shutdown_background();
    match ended? {
        Leave::GivenUp => Err(life.given_up()),
        Leave::Over => Ok(Exit::Solved),
        Leave::Asked | Leave::Moved => slurm.map_or(Ok(Exit::Solved), |slurm| slurm.handed_back()),
    }
}

/// Why a node leaves a coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    /// A signal.
    Asked,
    /// The coordinator is elsewhere now.
    Moved,
    /// No coordinator was reached for too long.
    GivenUp,
    /// No coordinator will come any more.
    Over,
}

impl Leave {
    fn words(self) -> &'static str {
        match self {
            Self::Asked => "the node was asked to stop",
            Self::Moved => "the coordinator is not there any more",
            Self::GivenUp => "the coordinator was not reached for too long",
            Self::Over => "there is nothing left to do",
        }
    }
}

/// What stays the same whatever coordinator is served.
struct Life {
    place: Whereabouts,
    name: String,
    transport: Transport,
    security: SecurityArgs,
    listen: String,
    advertise: Option<String>,
    resources: Resources,
    health: Health,
    nccl: bool,
    patience: Option<Duration>,
}

impl Life {
    fn new(
        arguments: NodeArgs,
        place: Whereabouts,
        slurm: Option<&Slurm>,
        health: Health,
    ) -> Result<Self, CliError> {
        let security = arguments.connect.security;
        let listen = match arguments.listen {
            Some(address) => address.to_string(),
            None if security.insecure => "127.0.0.1:0".into(),
            None => "0.0.0.0:0".into(),
        };
        let mut work = arguments.work;
        let nccl = work.nccl;
        if work.device.is_none() {
            work.device = device_of(slurm)?;
        }
        work.threads = work.threads.or(slurm.and_then(|slurm| slurm.allocation.cpus));
        let of_slurm = slurm.and_then(|slurm| slurm.allocation.name());
        Ok(Self {
            place,
            name: arguments.name.or(of_slurm).unwrap_or_else(host_name),
            transport: transport(&security, Role::Node)?,
            security,
            listen,
            advertise: arguments.advertise,
            resources: resources(work)?,
            health,
            nccl,
            patience: arguments.give_up_after.map(Duration::from_secs),
        })
    }

    /// Serves the coordinator wherever it is.
    async fn live(&self, shutdown: &Shutdown) -> Result<Leave, CliError> {
        loop {
            let address = tokio::select! {
                known = self.place.known(|why| say(&format!("Waiting: {why}"))) => known?,
                () = shutdown.asked() => return Ok(Leave::Asked),
                () = passed(self.patience) => return Ok(Leave::GivenUp),
            };
            let Some(address) = address else {
                say("Nothing left to do");
                return Ok(Leave::Over);
            };
            let why = self.serve(&address, shutdown).await?;
            match why {
                Leave::Moved => say(&format!("Leaving {address}: {}", why.words())),
                Leave::Asked | Leave::GivenUp | Leave::Over => return Ok(why),
            }
        }
    }

    /// Serves one coordinator until there is a reason to leave.
    async fn serve(&self, address: &str, shutdown: &Shutdown) -> Result<Leave, CliError> {
        self.security.check(address)?;
        let node = opened(&self.resources, self.nccl)?;
        let (attached, attachment) = watch::channel(false);
        let told = telling(self.health.clone());
        let tell = move |event: DaemonEvent| {
            match event {
                DaemonEvent::Attached { .. } => drop(attached.send_replace(true)),
                DaemonEvent::Waiting { .. } => drop(attached.send_replace(false)),
                _ => {}
            }
            told(event);
        };
        let drain = Drain::new();
        let mut running =
            std::pin::pin!(NodeDaemon::new(node, self.options(address)).run(drain.clone(), tell));
        let why = tokio::select! {
            over = &mut running => return over.map(|()| Leave::Asked).map_err(ended),
            () = shutdown.asked() => Leave::Asked,
            () = self.place.moved(address) => Leave::Moved,
            () = lonely(attachment, self.patience) => Leave::GivenUp,
        };
        drain.begin(why.words());
        running.await.map(|()| why).map_err(ended)
    }

    fn options(&self, coordinator: &str) -> DaemonOptions {
        let everywhere = self.listen.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_unspecified());
        let reachable = || everywhere.then(|| local_ip(coordinator)).flatten();
        DaemonOptions {
            name: self.name.clone(),
            coordinator: coordinator.into(),
            transport: self.transport.clone(),
            listen: self.listen.clone(),
            advertise: self.advertise.clone().or_else(reachable),
        }
    }

    fn given_up(&self) -> CliError {
        let seconds = self.patience.unwrap_or_default().as_secs();
        CliError::new(Exit::Interrupted, format!("no coordinator was reached for {seconds} s: given up"))
            .hint("is it running, and is this its address? --give-up-after says how long to wait")
    }
}

/// The GPU that Slurm gave this task.
fn device_of(slurm: Option<&Slurm>) -> Result<Option<DeviceArg>, CliError> {
    let device = slurm.map_or(Ok(None), |slurm| slurm.allocation.device());
    device.map_err(|error| {
        CliError::configuration(error).hint("ask Slurm for as many GPUs as tasks on a host, or add --device")
    })
}

/// The folder whose space a node needs, by its name in metrics.
pub(super) fn spill(work: &WorkArgs) -> (&'static str, PathBuf) {
    ("spill", work.spill_dir.clone().unwrap_or_else(std::env::temp_dir))
}

/// What computes, with its devices.
///
/// # Errors
/// Bad configuration or bad input for a device, folder or library that cannot be used.
pub(super) fn open(work: WorkArgs) -> Result<LocalNode, CliError> {
    let nccl = work.nccl;
    opened(&resources(work)?, nccl)
}

fn resources(work: WorkArgs) -> Result<Resources, CliError> {
    if work.threads == Some(0) {
        return Err(CliError::configuration("threads is 0, expected 1 or more"));
    }
    Ok(Resources {
        memory_budget: work.memory_budget.unwrap_or(ByteSize(defaults::MEMORY_BUDGET)),
        spill_dir: work.spill_dir,
        threads: work.threads,
        device: DeviceConfig::new(work.device, work.gradients, work.cuda_libraries),
        onnxruntime: work.onnxruntime,
    })
}

fn opened(resources: &Resources, nccl: bool) -> Result<LocalNode, CliError> {
    let node = quantize::node(resources)?;
    let described = halfstep_work::Node::describe(&node);
    describe("node", &described.device, &described.engine);
    if let Some(line) = devices::line(node.devices()) {
        say(&line);
    }
    if nccl { exchanging(node) } else { Ok(node) }
}

/// Why a node ended that was not asked to.
pub(super) fn ended(error: DaemonError) -> CliError {
    match error {
        DaemonError::Transport(error) => unusable(error),
        error @ DaemonError::Refused { .. } => CliError::configuration(error),
        error @ DaemonError::Thread(_) => CliError::internal(error),
    }
}

/// Returns when this much time has passed; never without a limit.
async fn passed(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Returns when the node has been without a coordinator for `patience`.
async fn lonely(mut attached: watch::Receiver<bool>, patience: Option<Duration>) {
    loop {
        tokio::select! {
            () = passed(patience) => return,
            known = attached.wait_for(|attached| *attached) => if known.is_err() { break },
        }
        if attached.wait_for(|attached| !*attached).await.is_err() {
            break;
        }
    }
    // The daemon is gone, and has said why.
    std::future::pending().await
}

/// The same node, in groups.
fn exchanging(node: LocalNode) -> Result<LocalNode, CliError> {
    let exchange = devices::exchange(node.devices())?;
    say(&format!("Adding up statistics by {}", exchange.describe()));
    Ok(node.exchanging_by(exchange))
}

pub(super) fn tell(event: &DaemonEvent) {
    say(&match event {
        DaemonEvent::Listening { address } => format!("Serving on {address}"),
        DaemonEvent::Attached { coordinator, node } => format!("Attached to {coordinator} as {node}"),
        DaemonEvent::Waiting { coordinator, why } => format!("Waiting for {coordinator}: {why}"),
        DaemonEvent::LeftOut { job, reason } => format!("Left out of {job}, waiting for the next: {reason}"),
        DaemonEvent::Draining => "Draining".into(),
    });
}

/// Tells people and probes what happens.
pub(super) fn telling(health: Health) -> impl Fn(DaemonEvent) + Send + Sync {
    move |event| {
        tell(&event);
        judge(&health, &event);
    }
}

/// Ready is a node that is attached to its coordinator and not about to leave.
fn judge(health: &Health, event: &DaemonEvent) {
    match event {
        DaemonEvent::Listening { .. } => health.started(),
        DaemonEvent::Attached { .. } => health.ready(true),
        DaemonEvent::Waiting { .. } | DaemonEvent::Draining => health.ready(false),
        DaemonEvent::LeftOut { .. } => {}
    }
}

/// The address of this machine that packets to the coordinator leave from. Nothing is sent.
fn local_ip(coordinator: &str) -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect(coordinator).ok()?;
    Some(socket.local_addr().ok()?.ip().to_string())
}

/// As the system says; only a label.
pub(super) fn host_name() -> String {
    let name = std::fs::read_to_string(Path::new("/etc/hostname")).unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "node".into() } else { name.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_is_lonely_only_while_it_has_no_coordinator() {
        let limit = Duration::from_millis(200);
        let (tell, attached) = watch::channel(true);
        let lonely = tokio::spawn(lonely(attached, Some(limit)));
        tokio::time::sleep(3 * limit).await;
        assert!(!lonely.is_finished(), "it had a coordinator");
        tell.send_replace(false);
        let since = std::time::Instant::now();
        lonely.await.unwrap();
        assert!(since.elapsed() >= limit);
    }
}
