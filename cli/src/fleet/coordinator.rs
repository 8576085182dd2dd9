//! `coordinator`: the process that plans, leases, commits and exports.

use std::convert::Infallible;
use std::time::Duration;

use halfstep_coordinator::service::{Coordinator, CoordinatorOptions, Pulse, Timing, describe_metrics};
use halfstep_proto::Role;

use super::args::{CoordinatorArgs, TimesArgs};
use super::connect::{runtime, transport, unusable};
use super::{Again, Shutdown};
use crate::exit::{CliError, Exit};
use crate::observe::{Health, ObserveArgs, Observed, describe, say};

/// How often the engine is asked for a sign of life, and how long that may take.
const LOOK: Duration = Duration::from_secs(1);
const ANSWER: Duration = Duration::from_secs(3);

/// Runs until a signal asks it to stop.
///
/// # Errors
/// Bad configuration for an address or certificates that cannot be used, bad input for a state folder that cannot,
/// interrupted if it cannot go on.
pub(crate) fn coordinator(arguments: &CoordinatorArgs) -> Result<Exit, CliError> {
    let shutdown = Shutdown::listen(Again::Ignored)?;
    let folders = vec![("state", arguments.state_dir.clone())];
    let ObserveArgs { health, metrics, .. } = arguments.observe;
    let observed = Observed::open(health, metrics, folders)?;
    describe("coordinator", "", "");
    describe_metrics();
    let transport = transport(&arguments.security, Role::Coordinator)?;
    let mut options = CoordinatorOptions::new(&arguments.state_dir);
    options.timing = timing(&arguments.times);
    options.keep_jobs = arguments.keep_jobs.map(|jobs| jobs as usize);
    let runtime = runtime()?;
    let ran = runtime.block_on(async {
        let listener = transport.listen(&arguments.listen.to_string()).await.map_err(unusable)?;
        let address = listener.address();
        let mut coordinator = Coordinator::start(options, vec![listener], Vec::new()).await?;
        let pulse = coordinator.pulse();
        say(&format!("Listening on {address}"));
        observed.health.started();
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
        Ok(false) => Ok(Exit::Solved),
        Ok(true) => {
            let message = "the coordinator cannot go on; what was acknowledged is in the state folder";
            Err(CliError::new(Exit::Interrupted, message).hint("HALFSTEP_LOG=warn shows why; start it again"))
        }
        Err(error) => Err(error),
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
