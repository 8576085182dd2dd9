//! A pod that works: a node until it is stopped.

use halfstep_agent::{DaemonOptions, Drain, NodeDaemon, describe_metrics};
use halfstep_proto::Role;

use super::PodArgs;
use crate::exit::{CliError, Exit};
use crate::fleet::connect::{runtime, transport};
use crate::fleet::node::{ended, open, spill, telling};
use crate::fleet::{Again, Shutdown};
use crate::observe::Observed;

/// Works for `coordinator` until it is stopped.
///
/// # Errors
/// Always: interrupted when it was asked to stop, or when this machine cannot do the work, since another might; bad
/// configuration if the coordinator refuses it.
pub(super) fn work(arguments: PodArgs, coordinator: String) -> Result<Exit, CliError> {
    let shutdown = Shutdown::listen(Again::Ignored)?;
    let observed = Observed::of(&arguments.observe, vec![spill(&arguments.work)])?;
    describe_metrics();
    arguments.security.check(&coordinator)?;
    let host = arguments.peers.of(arguments.index);
    let options = DaemonOptions {
        name: host.clone(),
        coordinator,
        transport: transport(&arguments.security, Role::Node)?,
        listen: arguments.serve.to_string(),
        advertise: Some(host),
    };
    // What is wrong with all machines is wrong with that of index 0, whose exit code says so.
    let elsewhere = |error: CliError| CliError { exit: Exit::Interrupted, ..error };
    let daemon = NodeDaemon::new(open(arguments.work).map_err(elsewhere)?, options);
    let drain = Drain::new();
    let runtime = runtime()?;
    let ran = runtime.block_on(async {
        let asked = drain.clone();
        tokio::spawn(async move {
            shutdown.asked().await;
            asked.begin("the pod was asked to stop");
        });
        daemon.run(drain, telling(observed.health.clone())).await
    });
    runtime.shutdown_background();
    ran.map_err(ended)?;
    Err(CliError::new(Exit::Interrupted, "the pod was asked to stop; its work went back to the coordinator"))
}
