//! The wire: services, messages and their conversions, the data plane, TLS and identity.
//!
//! Not here: what is done with a message (`coordinator::service`, `agent::daemon`), the meaning of the types (`work`).

mod version;
pub mod wire;

pub use version::{PROTOCOL, VERSION};
