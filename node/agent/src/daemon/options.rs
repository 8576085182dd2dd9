//! What a daemon is told, what it says, and how it is asked to leave.

use halfstep_proto::{Transport, TransportError};
use halfstep_work::{JobId, NodeId};
use tokio::sync::watch;

/// What a daemon needs besides its node.
#[derive(Clone)]
pub struct DaemonOptions {
    /// Human name of the node.
    pub name: String,
    /// Where the coordinator is: `host:port`, or a name in memory.
    pub coordinator: String,
    /// How processes reach each other.
    pub transport: Transport,
    /// Where this node serves what it holds; port 0 (in memory: an empty name) takes a free one.
    pub listen: String,
    /// What others are told instead of the address listened at.
    pub advertise: Option<String>,
}

/// What happens to a daemon, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DaemonEvent {
    /// The data plane is open.
    Listening {
        /// Where others are told to fetch.
        address: String,
    },
    /// Part of the fleet.
    Attached {
        /// Where.
        coordinator: String,
        /// As whom.
        node: NodeId,
    },
    /// No coordinator at the moment; told again only when the reason changes.
    Waiting {
        /// Who is tried.
        coordinator: String,
        /// What came of the last try.
        why: String,
    },
    /// A job goes on without this node, which waits for the next one.
    LeftOut {
        /// Which.
        job: JobId,
        /// The coordinator's words.
        reason: String,
    },
    /// On the way out.
    Draining,
}

/// Why a daemon ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Its address.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The coordinator does not want it; trying again would not help.
    #[error("{coordinator} refused this node: {reason}")]
    Refused {
        /// Who.
        coordinator: String,
        /// Its words.
        reason: String,
    },
    /// A thread that cannot be had.
    #[error("cannot start a worker thread: {0}")]
    Thread(std::io::Error),
}

/// A handle that asks a daemon to leave; clones are the same handle. Asking twice is harmless.
#[derive(Clone, Debug)]
pub struct Drain(watch::Sender<Option<String>>);

impl Default for Drain {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Drain {
    /// Nothing asked yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks: leases go back, the daemon ends within five seconds.
    pub fn begin(&self, reason: &str) {
        self.0.send_if_modified(|asked| {
            let first = asked.is_none();
            asked.get_or_insert_with(|| reason.to_owned());
            first
        });
    }

    pub(super) fn asked(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Returns when asked.
    pub(super) async fn wait(&self) -> String {
        let mut receiver = self.0.subscribe();
        let reason = match receiver.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone(),
            // This handle has a sender itself, so there is always one.
            Err(_) => None,
        };
        reason.unwrap_or_default()
    }
}
