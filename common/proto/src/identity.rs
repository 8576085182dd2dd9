//! Who is at the other end of a connection, and in which role.

use std::fmt;
use tonic::{Request, Status};

/// What a process is in the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A person's tool: submits, watches, cancels, fetches results.
    Client,
    /// Does tasks.
    Node,
    /// Plans and keeps.
    Coordinator,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Client, Self::Node, Self::Coordinator];

    /// As in certificates and file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Node => "node",
            Self::Coordinator => "coordinator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The other end of an accepted connection; in the extensions of every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of this machine over plaintext loopback, or this process itself: trusted with every role.
    Local,
}

impl Peer {
    /// Whether it has one of these roles.
    pub fn is(&self, roles: &[Role]) -> bool {
        match self {
            Self::Local => !roles.is_empty(),
        }
    }

    /// Who sent this request.
    ///
    /// # Errors
    /// `unauthenticated` if the request did not come by a `Transport`.
    pub fn of<T>(request: &Request<T>) -> Result<&Self, Status> {
        let nobody = || Status::unauthenticated("the request came by no connection of a transport");
        request.extensions().get().ok_or_else(nobody)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.pad("a local process"),
        }
    }
}
