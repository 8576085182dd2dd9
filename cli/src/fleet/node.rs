//! `node`: the process that computes.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};

use halfstep_agent::{
    DaemonError, DaemonEvent, DaemonOptions, Drain, LocalNode, NodeDaemon, describe_metrics,
};
use halfstep_proto::Role;

use super::args::{NodeArgs, WorkArgs};
use super::connect::{runtime, transport, unusable};
use super::{Again, Shutdown};
use crate::config::{DeviceConfig, Resources, defaults};
use crate::exit::{CliError, Exit};
use crate::observe::{Health, ObserveArgs, Observed, describe, say};
use crate::values::ByteSize;
use crate::{devices, quantize};

/// Works until a signal asks it to stop.
///
/// # Errors
/// Bad configuration for an address or certificates that cannot be used or if the coordinator refuses this node.
pub(crate) fn node(arguments: NodeArgs) -> Result<Exit, CliError> {
    let shutdown = Shutdown::listen(Again::Ignored)?;
    let observed = Observed::open(&arguments.observe, vec![spill(&arguments.work)])?;
    describe_metrics();
    let security = &arguments.connect.security;
    let transport = transport(security, Role::Node)?;
    arguments.connect.check()?;
    let listen = match arguments.listen {
        Some(address) => address.to_string(),
        None if security.insecure => "127.0.0.1:0".into(),
        None => "0.0.0.0:0".into(),
    };
    let everywhere = listen.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_unspecified());
    let reachable = || everywhere.then(|| local_ip(&arguments.connect.coordinator)).flatten();
    let advertise = arguments.advertise.or_else(reachable);
    let options = DaemonOptions {
        name: arguments.name.unwrap_or_else(host_name),
        coordinator: arguments.connect.coordinator,
        transport,
        listen,
        advertise,
    };
    let daemon = NodeDaemon::new(open(arguments.work)?, options);
    let drain = Drain::new();
    let runtime = runtime()?;
    let ran = runtime.block_on(async {
        let asked = drain.clone();
        tokio::spawn(async move {
            shutdown.asked().await;
            asked.begin("the node was asked to stop");
        });
        daemon.run(drain, telling(observed.health.clone())).await
    });
    runtime.shutdown_background();
    ran.map_err(ended)?;
    Ok(Exit::Solved)
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
    if work.threads == Some(0) {
        return Err(CliError::configuration("threads is 0, expected 1 or more"));
    }
    let node = quantize::node(&Resources {
        memory_budget: work.memory_budget.unwrap_or(ByteSize(defaults::MEMORY_BUDGET)),
        spill_dir: work.spill_dir,
        threads: work.threads,
        device: DeviceConfig::new(work.device, work.gradients, work.cuda_libraries),
        onnxruntime: work.onnxruntime,
    })?;
    let described = halfstep_work::Node::describe(&node);
    describe("node", &described.device, &described.engine);
    if let Some(line) = devices::line(node.devices()) {
        say(&line);
    }
    Ok(node)
}

/// Why a node ended that was not asked to.
pub(super) fn ended(error: DaemonError) -> CliError {
    match error {
        DaemonError::Transport(error) => unusable(error),
        error @ DaemonError::Refused { .. } => CliError::configuration(error),
        error @ DaemonError::Thread(_) => CliError::internal(error),
    }
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
fn host_name() -> String {
    let name = std::fs::read_to_string(Path::new("/etc/hostname")).unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "node".into() } else { name.into() }
}
