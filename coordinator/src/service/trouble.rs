//! A disk that refuses: fleets wait until there is space again; who would rather stop can find out here.

use tokio::sync::watch;

/// The last thing the disk refused; clones are the same.
#[derive(Clone)]
pub(super) struct Trouble(watch::Sender<Option<String>>);

impl Default for Trouble {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Trouble {
    pub(super) fn tell(&self, error: &impl std::fmt::Display) {
        self.0.send_replace(Some(error.to_string()));
    }

    pub(super) fn watch(&self) -> watch::Receiver<Option<String>> {
        self.0.subscribe()
    }
}
