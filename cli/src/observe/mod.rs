//! What others may see of a process that stays: how it is.
//!
//! Served by a thread of its own that nothing else runs on, so that answers come whatever the process works on. What is
//! served is open to whoever reaches the port: it holds no secrets and changes nothing.
//! Not here: what is true of the process, which whoever runs it says.

mod args;
mod health;

pub(crate) use args::ObserveArgs;
pub(crate) use health::Health;

use halfstep_proto::{Security, Transport};
use tokio::runtime::{Builder, Runtime};

use crate::exit::CliError;
use crate::fleet::{say, unusable};

/// The ports that are open; closed when dropped.
pub(crate) struct Observed {
    pub(crate) health: Health,
    /// None when nothing is served.
    runtime: Option<Runtime>,
}

impl Observed {
    /// Opens what was asked for and says where.
    ///
    /// # Errors
    /// Bad configuration for an address that cannot be had.
    pub(crate) fn open(arguments: &ObserveArgs) -> Result<Self, CliError> {
        let health = Health::default();
        let Some(address) = arguments.health else { return Ok(Self { health, runtime: None }) };
        let runtime = runtime()?;
        let listening = Transport::tcp(Security::Public);
        let listener = runtime.block_on(listening.listen(&address.to_string())).map_err(unusable)?;
        say(&format!("Health on {}", listener.address()));
        runtime.spawn(health.clone().answer(listener));
        Ok(Self { health, runtime: Some(runtime) })
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
    let built = builder.worker_threads(1).thread_name("observe").enable_all().build();
    built.map_err(|error| CliError::internal(format!("runtime: {error}")))
}
