//! The stages of one range: which are open, and how far each has come.
//!
//! ```text
//!            all shards      all shards       every slice held       all chunks
//! Closed --> captured   -->  summed      -->  by some node      -->  committed  --> Over
//!            (peaks agreed)  (exact sums)     (means)                (or given up)
//!                  ^              |                |
//!                  +--------------+----------------+   a node lost takes its sums and means along
//! ```
//!
//! One stage of a lane is open at a time; with independent propagation the next one opens as soon as the sums of the
//! one before are complete.

use crate::{LayerId, PeakRecord, Receipt};
use std::ops::Range;
use std::sync::Arc;

/// Stages of one lane that may be open at once when layers do not wait for each other: bounds the memory for sums.
pub(super) const OPEN_MAX: usize = 2;

/// Whether a stage has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StageState {
    Closed,
    Open,
    Over,
}

/// Counts of one stage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stage {
    pub(super) state: StageState,
    pub(super) layers: Vec<LayerId>,
    /// Shards whose peaks are known.
    pub(super) captured: usize,
    /// Shards that are in somebody's sums.
    pub(super) summed: usize,
    pub(super) peaks: Vec<PeakRecord>,
    /// Peaks over all shards, once all are known.
    pub(super) agreed: Option<Arc<Vec<PeakRecord>>>,
    /// Whether something is still to be made from the sums.
    pub(super) needs_sums: bool,
}

impl Stage {
    pub(super) fn new(layers: Vec<LayerId>) -> Self {
        Self {
            state: StageState::Closed,
            layers,
            captured: 0,
            summed: 0,
            peaks: Vec::new(),
            agreed: None,
            needs_sums: true,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.state == StageState::Open
    }

    /// Which of capture, accumulate and reduce can be worked on.
    pub(super) fn gates(&self, shards: usize) -> [bool; 3] {
        let wanted = self.is_open() && self.needs_sums;
        let (captured, summed) = (self.captured == shards, self.summed == shards);
        [wanted && !summed && !captured, wanted && !summed && captured, wanted && summed]
    }
}

/// A range of stages that are worked on in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Lane {
    pub(super) stages: Range<usize>,
    /// First stage that is not over.
    pub(super) first: usize,
    /// First stage that is closed.
    pub(super) next: usize,
}

/// What is known of one layer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LayerState {
    /// Whose statistics it is solved with.
    pub(super) statistics: LayerId,
    /// Layers that are solved with its statistics, itself among them; none if it has another's.
    pub(super) readers: Vec<LayerId>,
    /// Slices whose means somebody holds.
    pub(super) means: usize,
    pub(super) slices: usize,
    pub(super) receipts: Vec<Option<Receipt>>,
    pub(super) solved: usize,
    pub(super) given_up: bool,
}

impl LayerState {
    pub(super) fn is_over(&self) -> bool {
        self.given_up || self.solved == self.receipts.len()
    }

    /// Whether all slices have been turned into means that are still held.
    pub(super) fn has_means(&self) -> bool {
        self.means == self.slices
    }
}
