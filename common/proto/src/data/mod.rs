//! The data plane: blobs in chunks, each with a CRC32C, the whole with a BLAKE3 hash.
//!
//! [`DataClient`] fetches, going on where a broken stream ended, and uploads; [`serve`] and [`receive`] are the other
//! ends, for handlers of the `Artefacts` service. Bytes are not copied on their way into a message.
//! Errors are `work::SourceError`: `PeerLost` (elsewhere or later may help), `Damaged`, `BadInput`, `Storage` (no space
//! there) or `Internal`. Not here: what a name stands for, where blobs are stored.

mod blocking;
mod client;
mod codes;
mod probe;
mod receive;
mod serve;
#[cfg(test)]
mod simulated;
mod sink;
#[cfg(test)]
mod tests;
mod traffic;
mod upload;

pub use blocking::BlockingData;
pub use client::{DataClient, Fetched, FetchedInto, Patience};
pub use codes::{error_of, status_of};
pub use probe::{PROBE_MAX, probe};
pub use receive::receive;
pub use serve::{Blob, ReplyStream, serve};
pub use sink::Sink;
pub use traffic::{Tamper, Traffic};

/// Bytes of a chunk at most.
pub const CHUNK_MAX: usize = 1 << 20;
/// Bytes of the chunks sent: 2 seconds of a 1 Mbit/s link, so that a slow peer is told from a silent one.
const CHUNK: usize = 256 << 10;
