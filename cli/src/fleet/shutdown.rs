//! Signals: the first asks to stop in order. What a second one means depends on who is asked.

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
    /// Begins to listen for SIGINT, SIGTERM and SIGHUP.
    ///
    /// # Errors
    /// Internal if the system refuses.
    pub(crate) fn listen(again: Again) -> Result<Self, CliError> {
        let (tell, asked) = watch::channel(false);
        let keep = Arc::new(tell);
        let tell = Arc::clone(&keep);
        ctrlc::set_handler(move || {
            if tell.send_replace(true) && again == Again::Ends {
                std::process::exit(i32::from(Exit::Interrupted.code()));
            }
        })
        .map_err(|error| CliError::internal(format!("signals: cannot be listened for: {error}")))?;
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
