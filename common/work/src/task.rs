//! Tasks a node can be given, and what comes back.

use crate::{ChunkId, LayerId, RangeId, SegmentId, ShardId, SliceId};
use halfstep_quant::Encodings;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// A unit of leased work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Task {
    /// Run the original model through all segments of a range on one shard and keep what the next range starts from.
    /// Only jobs with several ranges have it.
    Forward {
        /// The range run through; the carry kept belongs to the range after it.
        range: RangeId,
        /// Which samples.
        shard: ShardId,
    },
    /// Run one segment on one shard, on every stream the job has; keep the carry, report peaks.
    Capture {
        /// Which segment.
        segment: SegmentId,
        /// Which samples.
        shard: ShardId,
    },
    /// Add one shard's layer inputs at a stage to the statistics, in the agreed fixed point.
    Accumulate {
        /// The stage at the end of this segment.
        segment: SegmentId,
        /// Which samples.
        shard: ShardId,
        /// Peaks over *all* shards: they fix the exponents.
        peaks: Arc<Vec<PeakRecord>>,
    },
    /// Sum the partial statistics of all nodes over one slice of a layer's matrices, and turn the sums into means.
    Reduce {
        /// Which layer.
        layer: LayerId,
        /// Which rows of its matrices.
        slice: SliceId,
    },
    /// Decide the rounding of one row chunk.
    Solve {
        /// Which layer.
        layer: LayerId,
        /// Which rows.
        chunk: ChunkId,
    },
}

/// The four phases of a stage, in order, each waiting for the one before; and forward runs ahead of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TaskPhase {
    /// Runs of the original model through a whole range, for the range after it.
    Forward,
    /// Forward runs.
    Capture,
    /// Statistics of shards.
    Accumulate,
    /// Sums closed.
    Reduce,
    /// Rows solved.
    Solve,
}

impl TaskPhase {
    /// Every phase, for tables and tests.
    pub const ALL: [Self; 5] = [Self::Forward, Self::Capture, Self::Accumulate, Self::Reduce, Self::Solve];

    /// One word, in messages, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Capture => "capture",
            Self::Accumulate => "accumulate",
            Self::Reduce => "reduce",
            Self::Solve => "solve",
        }
    }
}

/// As people, logs and `explain` name a task: phase, range or stage or layer, shard or slice or chunk. `solve:12:0` is
/// the first chunk of layer 12.
impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (of, place) = match self {
            Self::Forward { range, shard } => (range.0, shard.0),
            Self::Capture { segment, shard } | Self::Accumulate { segment, shard, .. } => {
                (segment.0, shard.0)
            }
            Self::Reduce { layer, slice } => (layer.0, slice.0),
            Self::Solve { layer, chunk } => (layer.0, chunk.0),
        };
        write!(f, "{}:{of}:{place}", self.phase().name())
    }
}

impl Task {
    /// The phase it belongs to.
    pub fn phase(&self) -> TaskPhase {
        match self {
            Self::Forward { .. } => TaskPhase::Forward,
            Self::Capture { .. } => TaskPhase::Capture,
            Self::Accumulate { .. } => TaskPhase::Accumulate,
            Self::Reduce { .. } => TaskPhase::Reduce,
            Self::Solve { .. } => TaskPhase::Solve,
        }
    }

    /// The layer that suffers if this task fails for good; none if the whole job does.
    pub fn layer(&self) -> Option<LayerId> {
        match self {
            Self::Reduce { layer, .. } | Self::Solve { layer, .. } => Some(*layer),
            Self::Forward { .. } | Self::Capture { .. } | Self::Accumulate { .. } => None,
        }
    }
}

/// Largest absolute input of one use of one layer, on both streams, and how many positions were seen.
///
/// Peaks and counts bound every sum of products, so they fix one fixed-point exponent for all shards.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct PeakRecord {
    /// The layer.
    pub layer: LayerId,
    /// Which of its uses.
    pub use_index: u32,
    /// Original model.
    pub full_precision: f32,
    /// Model quantized so far.
    pub quantized: f32,
    /// Positions (rows of the unfolded input) that enter the statistics.
    pub positions: u64,
}

/// By bits: a record of a NaN is still the same record, and the task that carries it the same task.
impl PartialEq for PeakRecord {
    fn eq(&self, other: &Self) -> bool {
        let key =
            |r: &Self| (r.layer, r.use_index, r.full_precision.to_bits(), r.quantized.to_bits(), r.positions);
        key(self) == key(other)
    }
}

/// Max of peaks and sum of positions over shards: associative and commutative, so order cannot matter.
///
/// Non-finite peaks stay non-finite (`f32::max` would drop a NaN): the layer must fail, not be solved on less data.
pub fn agree_peaks(all: &mut Vec<PeakRecord>, shard: &[PeakRecord]) {
    for record in shard {
        match all.iter_mut().find(|r| (r.layer, r.use_index) == (record.layer, record.use_index)) {
            Some(known) => {
                known.full_precision = larger(known.full_precision, record.full_precision);
                known.quantized = larger(known.quantized, record.quantized);
                known.positions += record.positions;
            }
            None => all.push(*record),
        }
    }
    all.sort_by_key(|record| (record.layer, record.use_index));
}

fn larger(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}

/// Hard integers of one row chunk with their grid: the durable result of a `Solve`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rounding {
    /// The layer.
    pub layer: LayerId,
    /// The rows.
    pub chunk: ChunkId,
    /// Grid of these rows.
    pub encodings: Encodings,
    /// `[rows of the chunk, cols]` row-major grid integers.
    pub q: Vec<i32>,
    /// What was achieved.
    pub report: ChunkReport,
}

/// What a coordinator remembers of a committed rounding: the integers are in its artefact.
#[derive(Clone, Copy, Debug)]
pub struct Receipt {
    /// The layer.
    pub layer: LayerId,
    /// The rows.
    pub chunk: ChunkId,
    /// BLAKE3 of every bit of it: equal for equal results only.
    pub digest: [u8; 32],
    /// What was achieved.
    pub report: ChunkReport,
}

/// By every bit, as the digest has it: a report with a NaN is equal to itself.
impl PartialEq for Receipt {
    fn eq(&self, other: &Self) -> bool {
        (self.layer, self.chunk, self.digest) == (other.layer, other.chunk, other.digest)
    }
}

impl Receipt {
    /// That of a rounding.
    pub fn of(rounding: &Rounding) -> Self {
        let Rounding { layer, chunk, encodings, q, report } = rounding;
        let mut hasher = blake3::Hasher::new();
        let mut words = |values: &[u64]| {
            values.iter().for_each(|value| {
                hasher.update(&value.to_le_bytes());
            });
        };
        let grid = format!("{}/{}/{}", encodings.bits, encodings.scheme, encodings.granularity);
        words(&[u64::from(layer.0), u64::from(chunk.0), grid.len() as u64]);
        words(&[encodings.rows as u64, encodings.cols as u64, encodings.scale.len() as u64, q.len() as u64]);
        words(&[report.objective_nearest, report.objective, report.signal].map(f64::to_bits));
        words(&[report.rounded_away, report.guarded_rows, report.dead_inputs, report.zero_rows]);
        hasher.update(grid.as_bytes());
        encodings.scale.iter().for_each(|scale| {
            hasher.update(&scale.to_le_bytes());
        });
        for integers in [&encodings.zero_point, q] {
            for part in integers.chunks(1024) {
                let mut bytes = [0; 4096];
                bytes.as_chunks_mut::<4>().0.iter_mut().zip(part).for_each(|(to, v)| *to = v.to_le_bytes());
                hasher.update(&bytes[..part.len() * 4]);
            }
        }
        Self { layer: *layer, chunk: *chunk, digest: *hasher.finalize().as_bytes(), report: *report }
    }
}

/// Quality of one solved chunk on the calibration statistics; sums over rows, so chunks add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChunkReport {
    /// Mean squared output error of nearest rounding, summed over rows.
    pub objective_nearest: f64,
    /// The same for the result.
    pub objective: f64,
    /// Mean squared output of the original layer, summed over rows.
    pub signal: f64,
    /// Weights not rounded to nearest.
    pub rounded_away: u64,
    /// Rows where the guard fell back.
    pub guarded_rows: u64,
    /// Input columns that were zero on all data.
    pub dead_inputs: u64,
    /// Rows whose weights are all zero.
    pub zero_rows: u64,
}

impl ChunkReport {
    /// Adds another chunk of the same layer. `dead_inputs` belong to the layer: the largest is kept.
    pub fn add(&mut self, other: &Self) {
        self.objective_nearest += other.objective_nearest;
        self.objective += other.objective;
        self.signal += other.signal;
        self.rounded_away += other.rounded_away;
        self.guarded_rows += other.guarded_rows;
        self.dead_inputs = self.dead_inputs.max(other.dead_inputs);
        self.zero_rows += other.zero_rows;
    }
}

/// Seconds of the node that did a task: measurements, never part of a result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// All of it.
    pub seconds: f64,
    /// Of which refinement.
    pub refine_seconds: f64,
    /// Bytes fetched from other processes for it.
    pub bytes_fetched: u64,
}

/// What a finished task reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Done {
    /// The next range's start is held.
    Forwarded,
    /// Peaks of this shard at the segment's end.
    Captured {
        /// One per tapped use.
        peaks: Vec<PeakRecord>,
    },
    /// The shard's products are ready; they enter the node's sums once the coordinator has accepted this.
    Accumulated,
    /// The slice's means are held.
    Reduced,
    /// The result.
    Solved(Arc<Rounding>),
}

impl Done {
    /// Whether this is an answer to that task.
    pub fn answers(&self, task: &Task) -> bool {
        match (self, task) {
            (Self::Forwarded, Task::Forward { .. })
            | (Self::Captured { .. }, Task::Capture { .. })
            | (Self::Accumulated, Task::Accumulate { .. })
            | (Self::Reduced, Task::Reduce { .. }) => true,
            (Self::Solved(r), Task::Solve { layer, chunk }) => (r.layer, r.chunk) == (*layer, *chunk),
            _ => false,
        }
    }
}

/// What kind of failure: decides retry, blame and exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FailureClass {
    /// The user's model or data cannot be used: never retried.
    BadInput,
    /// Non-finite statistics or loss: the layer fails, the job goes on.
    NonFinite,
    /// Not enough memory for the task: retried with nothing beside it on its node, then elsewhere; given up at the third time.
    OutOfMemory,
    /// No space or no permission where the node writes: retried elsewhere or later, does not count.
    Storage,
    /// The node went away or its lease ran out: retried, counts (a task that kills nodes is given up).
    NodeLost,
    /// Another node that should have had data did not give it: retried, does not count.
    PeerLost,
    /// The device made no progress for too long: retried elsewhere, counts.
    Hung,
    /// Data failed its checksum: recomputed, does not count.
    Damaged,
    /// The node hands the task back (drain, preemption): retried at once, does not count.
    HandedBack,
    /// Two results of one task differ: the job stops.
    Nondeterminism,
    /// The job was told to stop.
    Cancelled,
    /// A broken promise inside Halfstep.
    Internal,
}

impl FailureClass {
    /// Every class, for tables and tests.
    pub const ALL: [Self; 12] = [
        Self::BadInput,
        Self::NonFinite,
        Self::OutOfMemory,
        Self::Storage,
        Self::NodeLost,
        Self::PeerLost,
        Self::Hung,
        Self::Damaged,
        Self::HandedBack,
        Self::Nondeterminism,
        Self::Cancelled,
        Self::Internal,
    ];

    /// One word, in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::BadInput => "bad_input",
            Self::NonFinite => "non_finite",
            Self::OutOfMemory => "out_of_memory",
            Self::Storage => "storage",
            Self::NodeLost => "node_lost",
            Self::PeerLost => "peer_lost",
            Self::Hung => "hung",
            Self::Damaged => "damaged",
            Self::HandedBack => "handed_back",
            Self::Nondeterminism => "nondeterminism",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal",
        }
    }

    /// Whether another attempt can help.
    pub fn retryable(self) -> bool {
        match self {
            Self::OutOfMemory
            | Self::Storage
            | Self::NodeLost
            | Self::PeerLost
            | Self::Hung
            | Self::Damaged
            | Self::HandedBack => true,
            Self::BadInput | Self::NonFinite | Self::Nondeterminism | Self::Cancelled | Self::Internal => {
                false
            }
        }
    }

    /// Whether the attempt counts against the task.
    pub fn counts(self) -> bool {
        match self {
            Self::NodeLost
            | Self::Hung
            | Self::BadInput
            | Self::NonFinite
            | Self::Nondeterminism
            | Self::Internal => true,
            Self::OutOfMemory
            | Self::Storage
            | Self::PeerLost
            | Self::Damaged
            | Self::HandedBack
            | Self::Cancelled => false,
        }
    }
}

/// A failed attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind.
    pub class: FailureClass,
    /// Subject, what is wrong, expected and actual.
    pub message: String,
}

impl Failure {
    /// Builds one from an error's text.
    pub fn new(class: FailureClass, error: impl std::fmt::Display) -> Self {
        Self { class, message: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(layer: u32, fp: f32, positions: u64) -> PeakRecord {
        PeakRecord { layer: LayerId(layer), use_index: 0, full_precision: fp, quantized: fp / 2.0, positions }
    }

    #[test]
    fn peaks_agree_on_the_maximum_in_any_order() {
        let shards = [record(1, 3.0, 5), record(0, 9.0, 2), record(1, 4.0, 7)];
        let mut forward = Vec::new();
        let mut backward = Vec::new();
        shards.iter().for_each(|r| agree_peaks(&mut forward, &[*r]));
        shards.iter().rev().for_each(|r| agree_peaks(&mut backward, &[*r]));
        assert_eq!(forward, backward);
        assert_eq!(forward, vec![record(0, 9.0, 2), PeakRecord { quantized: 2.0, ..record(1, 4.0, 12) }]);
    }

    #[test]
    fn a_nan_peak_survives_agreement() {
        let mut all = vec![record(0, f32::NAN, 1)];
        agree_peaks(&mut all, &[record(0, 1.0, 1)]);
        assert!(all[0].full_precision.is_nan());
    }
}
