//! `node`: the process that computes.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;

use halfstep_agent::{DaemonError, DaemonEvent, DaemonOptions, Drain, LocalNode, NodeDaemon};
use halfstep_proto::Role;

use super::args::NodeArgs;
use super::connect::{runtime, transport, unusable};
use super::coordinator::say;
use super::{Again, Shutdown};
use crate::config::{DeviceConfig, Resources, defaults};
use crate::exit::{CliError, Exit};
use crate::values::ByteSize;
use crate::{devices, quantize};

/// Works until a signal asks it to stop.
///
/// # Errors
/// Bad configuration for an address or certificates that cannot be used or if the coordinator refuses this node.
pub(crate) fn node(arguments: NodeArgs) -> Result<Exit, CliError> {
    if arguments.threads == Some(0) {
        return Err(CliError::configuration("threads is 0, expected 1 or more"));
    }
    let shutdown = Shutdown::listen(Again::Ignored)?;
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
    let resources = Resources {
        memory_budget: arguments.memory_budget.unwrap_or(ByteSize(defaults::MEMORY_BUDGET)),
        spill_dir: arguments.spill_dir,
        threads: arguments.threads,
        device: DeviceConfig::new(arguments.device, arguments.gradients, arguments.cuda_libraries),
        onnxruntime: arguments.onnxruntime,
    };
    let node = quantize::node(&resources)?;
    if let Some(line) = devices::line(node.devices()) {
        say(&line);
    }
    let node = match arguments.nccl {
        true => exchanging(node)?,
        false => node,
    };
    let drain = Drain::new();
    let runtime = runtime()?;
    let ran = runtime.block_on(async {
        let asked = drain.clone();
        tokio::spawn(async move {
            shutdown.asked().await;
            asked.begin("the node was asked to stop");
        });
        NodeDaemon::new(node, options).run(drain, |event| tell(&event)).await
    });
    runtime.shutdown_background();
    match ran {
        Ok(()) => Ok(Exit::Solved),
        Err(DaemonError::Transport(error)) => Err(unusable(error)),
        Err(error @ DaemonError::Refused { .. }) => Err(CliError::configuration(error)),
        Err(error @ DaemonError::Thread(_)) => Err(CliError::internal(error)),
    }
}

/// The same node, in groups.
fn exchanging(node: LocalNode) -> Result<LocalNode, CliError> {
    let exchange = devices::exchange(node.devices())?;
    say(&format!("Adding up statistics by {}", exchange.describe()));
    Ok(node.exchanging_by(exchange))
}

fn tell(event: &DaemonEvent) {
    say(&match event {
        DaemonEvent::Listening { address } => format!("Serving on {address}"),
        DaemonEvent::Attached { coordinator, node } => format!("Attached to {coordinator} as {node}"),
        DaemonEvent::Waiting { coordinator, why } => format!("Waiting for {coordinator}: {why}"),
        DaemonEvent::LeftOut { job, reason } => format!("Left out of {job}, waiting for the next: {reason}"),
        DaemonEvent::Draining => "Draining".into(),
    });
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
