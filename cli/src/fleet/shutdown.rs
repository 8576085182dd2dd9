//! Signals: the first asks to stop in order. What a second one means depends on who is asked.

use std::io;
use std::sync::Arc;

use tokio::sync::watch;

use crate::exit::{CliError, Exit};

/// What a second signal does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Again {
    /// Ends the process as if killed: for a person at a terminal who does not want to wait.
    Ends,
    /// Nothing: schedulers send SIGTERM twice, and stopping in order is bounded anyway.
    Ignored,
}

/// Told when the process should stop; clones hear the same.
#[derive(Clone)]
pub(crate) struct Shutdown {
    asked: watch::Receiver<bool>,
    _keep: Arc<watch::Sender<bool>>,
}

impl Shutdown {
    /// Begins to listen for SIGINT, SIGTERM, SIGHUP and SIGUSR1.
    ///
    /// # Errors
    /// Internal if the system refuses.
    pub(crate) fn listen(again: Again) -> Result<Self, CliError> {
        let (tell, asked) = watch::channel(false);
        let keep = Arc::new(tell);
        let tell = Arc::clone(&keep);
        let hear = move || {
            if tell.send_replace(true) && again == Again::Ends {
                std::process::exit(i32::from(Exit::Interrupted.code()));
            }
        };
        let refused = |error: &dyn std::fmt::Display| {
            CliError::internal(format!("signals: cannot be listened for: {error}"))
        };
        on_announcement(hear.clone()).map_err(|error| refused(&error))?;
        ctrlc::set_handler(hear).map_err(|error| refused(&error))?;
        Ok(Self { asked, _keep: keep })
    }

    /// Whether a signal came.
    pub(crate) fn is_asked(&self) -> bool {
        *self.asked.borrow()
    }

    /// Returns when a signal has come.
    pub(crate) async fn asked(&self) {
        // The sender lives as long as this.
        let _ = self.asked.clone().wait_for(|asked| *asked).await;
    }
}

/// SIGUSR1, by which schedulers announce the end of a job's time; `ctrlc` does not know it.
#[cfg(unix)]
fn on_announcement(hear: impl Fn() + Send + 'static) -> io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGUSR1])?;
    let listen = move || signals.forever().for_each(|_| hear());
    std::thread::Builder::new().name("signals".into()).spawn(listen).map(drop)
}

#[cfg(not(unix))]
fn on_announcement(_: impl Fn() + Send + 'static) -> io::Result<()> {
    Ok(())
}
