//! How processes reach each other: TCP with mutual TLS, TCP in the clear on loopback, or memory.
//!
//! A [`Transport`] is one of these for a whole process; from it come [`Listener`]s, to be given to
//! [`Services::serve`](crate::Services::serve), and [`Connector`]s, from which come tonic channels that connect when
//! used and again after a loss. Whatever carries the bytes, handlers find a [`Peer`](crate::Peer) in the extensions of
//! a request. Not here: certificates (`tls`), who may call what (`roles`).

mod accept;
mod connect;
mod connection;
mod memory;
mod network;
mod tcp;
#[cfg(test)]
mod tests;

pub use accept::{Incoming, Limits, Listener};
pub use connect::{Connector, explain};
pub use connection::Connection;
pub use memory::Memory;
pub use network::{Accept, Accepted, BoxIo, Io, Network};
pub use tcp::Tcp;

use crate::{Role, Tls};
use std::io;
use std::sync::Arc;

/// Whether connections are encrypted and peers identified.
#[derive(Clone)]
pub enum Security {
    /// Neither: every peer is trusted with every role. TCP refuses addresses that are not loopback.
    Plaintext,
    /// Neither, at any address: for ports that tell anybody how this process is. Peers are trusted with nothing else.
    Public,
    /// Both, with these certificates.
    Tls(Arc<Tls>),
}

/// Why a transport cannot be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Plaintext beyond this machine.
    #[error(
        "`{address}` is {found}, not a loopback address: without certificates only processes of one machine may talk, \
         make some with `halfstep certs`"
    )]
    NotLoopback {
        /// As given.
        address: String,
        /// What it resolves to.
        found: std::net::IpAddr,
    },
    /// A name that means nothing.
    #[error("address `{address}` cannot be resolved, expected HOST:PORT: {source}")]
    Resolve {
        /// As given.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// A port that cannot be had.
    #[error("cannot listen on `{address}`: {source}")]
    Listen {
        /// As given.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Nobody there.
    #[error("cannot connect to `{address}`: {message}")]
    Connect {
        /// As given.
        address: String,
        /// All causes.
        message: String,
    },
}

/// What carries connections, and how they are secured.
#[derive(Clone)]
pub struct Transport {
    network: Arc<dyn Network>,
    security: Security,
}

impl Transport {
    /// TCP.
    pub fn tcp(security: Security) -> Self {
        let loopback_only = matches!(security, Security::Plaintext);
        Self { network: Arc::new(Tcp::new(loopback_only)), security }
    }

    /// A network of its own in the memory of this process. Addresses are any names; nothing is encrypted.
    pub fn memory() -> Self {
        Self::over(Memory::default(), Security::Plaintext)
    }

    /// Any other network, such as a simulated one. Addresses are not checked.
    pub fn over(network: impl Network, security: Security) -> Self {
        Self { network: Arc::new(network), security }
    }

    /// Waits for connections at `address`; port 0 (in memory: an empty name) takes a free one.
    ///
    /// # Errors
    /// `NotLoopback`, `Resolve`, `Listen`.
    pub async fn listen(&self, address: &str) -> Result<Listener, TransportError> {
        let accept = self.network.listen(address.to_owned()).await?;
        Ok(Listener::new(accept, self.security.clone()))
    }

    /// The way to `address`, where a process of role `expects` should be. Nothing is sent yet.
    pub fn connector(&self, address: &str, expects: Role) -> Connector {
        Connector::new(self.network.clone(), self.security.clone(), address.to_owned(), expects)
    }
}
