//! The wire: services, messages and their conversions, the data plane, TLS and identity.
//!
//! Not here: what is done with a message (`coordinator::service`, `agent::daemon`), the meaning of the types (`work`).

pub mod certs;
mod convert;
pub mod data;
mod error;
pub mod events;
mod hash;
mod identity;
pub mod roles;
pub mod rounding;
mod services;
pub mod telemetry;
pub mod tensors;
#[cfg(test)]
mod testing;
mod tls;
pub mod transport;
mod version;
pub mod wire;

pub use convert::{BlobName, Commit, DoneRef, Fetch, job_from_wire, job_to_wire};
pub use error::WireError;
pub use events::JobEvent;
pub use hash::BlobHash;
pub use identity::{Certified, Peer, Role};
pub use services::Services;
pub use tls::{Tls, TlsError, TlsFiles};
pub use transport::{Connector, Limits, Listener, Security, Transport, TransportError, explain};
pub use version::{PROTOCOL, VERSION, check_hello, hello};
