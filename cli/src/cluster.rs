//! A whole fleet in this process: one coordinator and one node, joined by memory instead of a network.
//!
//! Not here: the services themselves (`coordinator`, `agent`), what a client asks of them (`fleet`).

use std::path::Path;
use std::time::Duration;

use halfstep_agent::{DaemonError, DaemonOptions, Drain, LocalNode, NodeDaemon};
use halfstep_coordinator::service::{Coordinator, CoordinatorOptions, Timing};
use halfstep_proto::{Role, Transport};
use halfstep_work::JobId;
use tokio::task::JoinHandle;

use crate::exit::CliError;
use crate::fleet::Line;

const COORDINATOR: &str = "coordinator";
/// Within one process nobody is cut off: what is silent is busy.
const LEASE: Duration = Duration::from_secs(3600);

/// See the module.
pub(crate) struct Cluster {
    transport: Transport,
    coordinator: Coordinator,
    drain: Drain,
    node: JoinHandle<Result<(), DaemonError>>,
}

impl Cluster {
    /// Starts both for one job; the coordinator's state is in `state`, where any other job is forgotten.
    ///
    /// # Errors
    /// If the state cannot be used, above all because another process is using it.
    pub(crate) async fn start(state: &Path, job: JobId, node: LocalNode) -> Result<Self, CliError> {
        let transport = Transport::memory();
        let listener = transport.listen(COORDINATOR).await.map_err(CliError::internal)?;
        let mut options = CoordinatorOptions::new(state);
        options.only = Some(job);
        options.timing = Timing { lease: LEASE, hung: LEASE * 24, ..Timing::default() };
        let coordinator = Coordinator::start(options, vec![listener], Vec::new()).await?;
        let drain = Drain::new();
        let options = DaemonOptions {
            name: "local".into(),
            coordinator: COORDINATOR.into(),
            transport: transport.clone(),
            listen: String::new(),
            advertise: None,
        };
        let node = tokio::spawn(NodeDaemon::new(node, options).run(drain.clone(), |_| {}));
        Ok(Self { transport, coordinator, drain, node })
    }

    /// A client's line to the coordinator.
    pub(crate) fn line(&self) -> Line {
        Line::new(&self.transport.connector(COORDINATOR, Role::Coordinator))
    }

    /// Returns when there is no room for what has to be kept. A fleet waits for space; a person at a terminal is told.
    pub(crate) fn refused_by_disk(&self) -> impl Future<Output = String> + Send + 'static {
        self.coordinator.refused_by_disk()
    }

    /// Stops both; what was acknowledged is on disk.
    pub(crate) async fn stop(self) {
        self.drain.begin("the process ends");
        // The node first, so that it can hand its work back.
        let _ = self.node.await;
        self.coordinator.stop().await;
    }
}
