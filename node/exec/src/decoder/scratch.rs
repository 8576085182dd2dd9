//! Memory of one run, kept for the next.
//!
//! Not here: who holds it between runs (`session`).

use super::positions::Tables;
use halfstep_compute::cpu::AttentionScratch;

/// Buffers and tables that survive a run.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) tables: Tables,
    pub(super) attention: AttentionScratch,
    /// Free buffers of `tokens` rows each.
    free: Vec<Vec<f32>>,
    tokens: Option<usize>,
}

impl Scratch {
    /// Prepares for a batch: buffers of another size are of no use.
    pub(super) fn begin(&mut self, tokens: Option<usize>) {
        if self.tokens != tokens {
            self.free.clear();
        }
        self.tokens = tokens;
    }

    /// A buffer of exactly that length; what it holds is not said.
    pub(super) fn take(&mut self, len: usize) -> Vec<f32> {
        let fitting = self.free.iter().position(|buffer| buffer.len() == len);
        fitting.map_or_else(|| vec![0.0; len], |index| self.free.swap_remove(index))
    }

    /// Takes back a buffer of `rows` rows that nothing reads any more.
    pub(super) fn give(&mut self, rows: usize, buffer: Vec<f32>) {
        if Some(rows) == self.tokens {
            self.free.push(buffer);
        }
    }
}
