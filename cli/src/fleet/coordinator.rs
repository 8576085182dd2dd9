//! `coordinator`: the process that plans, leases, commits and exports.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use halfstep_coordinator::service::{Coordinator, CoordinatorOptions, Pulse, Timing, describe_metrics};
use halfstep_proto::Role;

use super::args::{CoordinatorArgs, TimesArgs};
use super::connect::{runtime, transport, unusable};
use super::node::host_name;
use super::slurm::Slurm;
use super::whereabouts::publish;
use super::{Again, Shutdown};
use crate::exit::{CliError, Exit};
use crate::observe::{Health, Observed, describe, say};

/// How often the engine is asked for a sign of life, and how long that may take.
const LOOK: Duration = Duration::from_secs(1);
const ANSWER: Duration = Duration::from_secs(3);

/// Without a flag or Slurm.
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7421);

/// Runs until a signal asks it to stop.
///
/// # Errors
/// Bad configuration for an address or certificates that cannot be used, bad input for a state folder or an address file
/// that cannot, interrupted if it cannot go on.
pub(crate) fn coordinator(arguments: &CoordinatorArgs) -> Result<Exit, CliError> {
    let shutdown = Shutdown::listen(Again::Ignored)?;
    let folders = vec![("state", arguments.state_dir.clone())];
    let observed = Observed::of(&arguments.observe, folders)?;
    describe("coordinator", "", "");
    describe_metrics();
    let slurm = Slurm::of(&arguments.slurm)?;
    let listen = arguments.listen.unwrap_or_else(|| listen_by_default(slurm.as_ref()));
    let transport = transport(&arguments.security, Role::Coordinator)?;
    let mut options = CoordinatorOptions::new(&arguments.state_dir);
    options.timing = timing(&arguments.times);
    options.keep_jobs = arguments.keep_jobs.map(|jobs| jobs as usize);
    let runtime = runtime()?;
    let ran = runtime.block_on(async {
        let listener = transport.listen(&listen.to_string()).await.map_err(unusable)?;
        let address = listener.address();
        let mut coordinator = Coordinator::start(options, vec![listener], Vec::new()).await?;
        let pulse = coordinator.pulse();
        say(&format!("Listening on {address}"));
        observed.health.started();
        if let Some(file) = &arguments.publish {
            publish(&reachable(&address, slurm.as_ref()), file)?;
        }
        coordinator.resuming().iter().for_each(|job| say(&format!("Resuming {job}")));
        let failed = tokio::select! {
            () = shutdown.asked() => false,
            () = coordinator.failed() => true,
            never = look_after(&pulse, &observed.health) => match never {},
        };
        observed.health.ready(false);
        coordinator.stop().await;
        Ok(failed)
    });
    runtime.shutdown_background();
    match ran {
        Ok(false) => slurm.map_or(Ok(Exit::Solved), |slurm| slurm.handed_back()),
        Ok(true) => {
            let message = "the coordinator cannot go on; what was acknowledged is in the state folder";
            Err(CliError::new(Exit::Interrupted, message).hint("HALFSTEP_LOG=warn shows why; start it again"))
        }
        Err(error) => Err(error),
    }
}

fn listen_by_default(slurm: Option<&Slurm>) -> SocketAddr {
    let of_job = |slurm: &Slurm| (Ipv4Addr::UNSPECIFIED, slurm.allocation.port()).into();
    slurm.map_or(DEFAULT_LISTEN, of_job)
}

/// What others can do with the address listened at: of all interfaces it becomes this host's name.
fn reachable(listening: &str, slurm: Option<&Slurm>) -> String {
    match listening.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() => {
            let host = slurm.and_then(|slurm| slurm.allocation.host.clone()).unwrap_or_else(host_name);
            format!("{host}:{}", address.port())
        }
        _ => listening.into(),
    }
}

/// Ready is a coordinator whose engine is at work.
pub(super) async fn look_after(pulse: &Pulse, health: &Health) -> Infallible {
    loop {
        health.ready(pulse.beats(ANSWER).await);
        tokio::time::sleep(LOOK).await;
    }
}

pub(super) fn timing(times: &TimesArgs) -> Timing {
    Timing {
        heartbeat: Duration::from_millis(times.heartbeat_ms.max(1)),
        lease: Duration::from_millis(times.lease_ms.max(1)),
        hung: Duration::from_millis(times.hung_ms.max(1)),
        no_nodes: Duration::from_millis(times.no_nodes_ms.max(1)),
    }
}
