//! The wire: services, messages and their conversions, the data plane, TLS and identity.
//!
//! Not here: what is done with a message (`coordinator::service`, `agent::daemon`), the meaning of the types (`work`).

mod convert;
mod error;
pub mod events;
mod hash;
pub mod rounding;
pub mod tensors;
mod version;
pub mod wire;

pub use convert::{BlobName, Commit, DoneRef, Fetch, job_from_wire, job_to_wire};
pub use error::WireError;
pub use events::JobEvent;
pub use hash::BlobHash;
pub use version::{PROTOCOL, VERSION, check_hello, hello};
