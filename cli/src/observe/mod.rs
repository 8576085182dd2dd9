//! What others may see of a process that stays: how it is, what it has counted, what it logs.
//!
//! Ports are served by a thread of its own that nothing else runs on, so that answers come whatever the process works
//! on. What is served is open to whoever reaches a port: it holds no secrets and changes nothing.
//! Not here: what is true of the process, which whoever runs it says.

mod args;
mod health;
mod log;
mod metrics;

pub(crate) use self::metrics::{Folders, describe};
pub(crate) use args::ObserveArgs;
pub(crate) use health::Health;
pub(crate) use log::{LogFormat, begin as begin_log, fail, say};

use std::net::SocketAddr;

use halfstep_proto::{Listener, Security, Transport};
use tokio::runtime::{Builder, Runtime};

use crate::exit::CliError;
use crate::fleet::unusable;

/// The ports that are open; closed when dropped.
pub(crate) struct Observed {
    pub(crate) health: Health,
    /// None when nothing is served.
    runtime: Option<Runtime>,
}

impl Observed {
    /// Opens the ports that are asked for and says where. `folders`: those whose disks the metrics show.
    ///
    /// # Errors
    /// Bad configuration for an address that cannot be had.
    pub(crate) fn open(
        health: Option<SocketAddr>,
        metrics: Option<SocketAddr>,
        folders: Folders,
    ) -> Result<Self, CliError> {
        let mut observed = Self { health: Health::default(), runtime: None };
        if let Some(address) = health {
            observed.answer_probes(address)?;
        }
        if let Some(address) = metrics {
            observed.show_metrics(address, folders)?;
        }
        Ok(observed)
    }

    /// [`Observed::open`] as the flags say.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn of(arguments: &ObserveArgs, folders: Folders) -> Result<Self, CliError> {
        Self::open(arguments.health, arguments.metrics, folders)
    }

    fn answer_probes(&mut self, address: SocketAddr) -> Result<(), CliError> {
        let health = self.health.clone();
        let (runtime, listener) = self.listen(address)?;
        say(&format!("Health on {}", listener.address()));
        runtime.spawn(health.answer(listener));
        Ok(())
    }

    fn show_metrics(&mut self, address: SocketAddr, folders: Folders) -> Result<(), CliError> {
        let (runtime, listener) = self.listen(address)?;
        let collector = metrics::Collector::install(folders)?;
        say(&format!("Metrics on http://{}/metrics", listener.address()));
        runtime.spawn(collector.serve(listener));
        Ok(())
    }

    fn listen(&mut self, address: SocketAddr) -> Result<(&Runtime, Listener), CliError> {
        let runtime = match self.runtime.take() {
            Some(runtime) => runtime,
            None => runtime()?,
        };
        let runtime = self.runtime.insert(runtime);
        let public = Transport::tcp(Security::Public);
        let listener = runtime.block_on(public.listen(&address.to_string())).map_err(unusable)?;
        Ok((runtime, listener))
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// One thread, for nothing else.
fn runtime() -> Result<Runtime, CliError> {
    let mut builder = Builder::new_multi_thread();
    let built = builder.worker_threads(1).max_blocking_threads(2).thread_name("observe").enable_all().build();
    built.map_err(|error| CliError::internal(format!("runtime: {error}")))
}
