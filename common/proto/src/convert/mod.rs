//! Between the types of `work` and the messages of the wire, one family a file.
//!
//! To the wire: `From`, cannot fail. From the wire: `TryFrom`, checks everything that later code relies on: parts that
//! must be there, enums that mean something, lengths, orders and counts. Ids are not checked against a plan here.

mod fetch;
mod group;
mod held;
mod node;
mod outcome;
mod task;
#[cfg(test)]
mod tests;

pub use fetch::{BlobName, Fetch};
pub use outcome::{Commit, DoneRef};

use crate::WireError;
use halfstep_work::{JobId, ShardId};

/// Peaks in one message: uses of the layers of one stage.
const PEAKS_MAX: usize = 1 << 16;
/// Shards, pieces of held state or leases in one message.
const COUNT_MAX: usize = 1 << 18;
/// Bytes of a name or an address.
const NAME_MAX: usize = 4096;
/// Bytes of an explanation; longer ones are cut by the sender.
const MESSAGE_MAX: usize = 16 << 10;

/// A job id as a field of a message.
pub fn job_to_wire(job: JobId) -> Vec<u8> {
    job.0.to_vec()
}

/// A job id from a field of a message.
///
/// # Errors
/// If it is not 16 bytes long.
pub fn job_from_wire(bytes: &[u8]) -> Result<JobId, WireError> {
    let problem = || format!("expected 16 bytes, found {}", bytes.len());
    bytes.try_into().map(JobId).map_err(|_| WireError::new("job id", problem()))
}

fn present<T>(part: Option<T>, subject: &str) -> Result<T, WireError> {
    part.ok_or_else(|| WireError::missing(subject))
}

fn at_most(subject: &str, actual: usize, most: usize) -> Result<(), WireError> {
    if actual <= most {
        return Ok(());
    }
    Err(WireError::new(subject, format!("expected at most {most}, found {actual}")))
}

fn all<W, T: TryFrom<W, Error = WireError>>(
    items: Vec<W>,
    subject: &str,
    most: usize,
) -> Result<Vec<T>, WireError> {
    at_most(subject, items.len(), most)?;
    items.into_iter().map(T::try_from).collect()
}

fn shards_to_wire(shards: &[ShardId]) -> Vec<u32> {
    shards.iter().map(|shard| shard.0).collect()
}

fn shards_from_wire(shards: Vec<u32>) -> Result<Vec<ShardId>, WireError> {
    at_most("list of shards", shards.len(), COUNT_MAX)?;
    if let Some(pair) = shards.windows(2).find(|pair| pair[0] >= pair[1]) {
        let problem = format!("expected ascending numbers, found {} before {}", pair[0], pair[1]);
        return Err(WireError::new("list of shards", problem));
    }
    Ok(shards.into_iter().map(ShardId).collect())
}

/// Seconds and rates: finite and not negative.
fn amount(subject: &str, value: f64) -> Result<f64, WireError> {
    if value.is_finite() && value >= 0.0 {
        return Ok(value);
    }
    Err(WireError::new(subject, format!("expected a finite number from 0, found {value}")))
}

/// Cuts an explanation to what a receiver takes.
fn shortened(mut text: String) -> String {
    if text.len() > MESSAGE_MAX {
        text.truncate(text.floor_char_boundary(MESSAGE_MAX));
    }
    text
}
