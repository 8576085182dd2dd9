//! One round: a layer's sums added up over all members of a group, slice by slice, and turned into means.
//!
//! Before anything is added, members add a digest of what they are about to add: if they are not at the same, its sum is
//! not that of equal digests, and the round fails instead of giving sums of different things.
//! Not here: waiting for the result (`together`).

use crate::job::Job;
use halfstep_compute::cuda::{Communicator, NcclError, Patience};
use halfstep_exec::{ExecError, LayerStatistics, SumSlice, UseSlice};
use halfstep_work::{Failure, PeakRecord, Round, SliceId};
use std::sync::Arc;

/// Why a round gave nothing, or not all. The group is not to be used any more: others may wait in vain.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RoundError {
    /// The group.
    #[error(transparent)]
    Group(#[from] NcclError),
    /// This node's part.
    #[error("{0}")]
    Part(#[from] Failure),
    /// Means that cannot be made.
    #[error(transparent)]
    Means(#[from] ExecError),
    /// Members that are not at the same.
    #[error("round {number}: the members are not at the same layer with the same peaks")]
    Differs {
        /// Of this epoch.
        number: u64,
    },
    /// Peaks that are not the layer's.
    #[error("round {number}: {found} peaks, expected those of {expected} uses")]
    Peaks {
        /// Of this epoch.
        number: u64,
        /// Uses of the layer.
        expected: usize,
        /// How many came.
        found: usize,
    },
}

/// What a node adds.
enum Part {
    /// Nothing is added: the inputs are not finite, on any node.
    NotFinite,
    /// Its own sums.
    Own,
    /// It has no sums: zeros, in the form of everybody's.
    Zeros(Vec<Arc<LayerStatistics>>),
}

impl Job {
    /// Works off one round of a group's epoch. What is complete is kept, slice by slice, whatever comes after it.
    pub(crate) fn add_up(
        &self,
        epoch: u64,
        round: &Round,
        group: &mut Communicator,
        patience: &Patience<'_>,
    ) -> Result<(), RoundError> {
        let part = self.part(round)?;
        let slices: Vec<SliceId> = match self.entry(round.layer)?.statistics_of {
            None => self.plan.slice_ids(round.layer).collect(),
            Some(_) => Vec::new(),
        };
        let first = slices.first().map(|slice| self.slice_of(&part, round, *slice)).transpose()?.flatten();
        self.agree(epoch, round, first.as_ref(), group, patience)?;
        if matches!(part, Part::NotFinite) {
            return Ok(());
        }
        for slice in slices {
            let Some(mut sum) = self.slice_of(&part, round, slice)? else { return Ok(()) };
            let mut values: Vec<i64> = sum.uses.iter().flat_map(|one| one.sums.iter().copied()).collect();
            group.all_reduce(&mut values, patience)?;
            let mut rest = values.as_slice();
            for one in &mut sum.uses {
                let (own, others) = rest.split_at(one.sums.len());
                one.sums.copy_from_slice(own);
                rest = others;
            }
            self.together.put(round.layer, slice, sum.means()?);
        }
        Ok(())
    }

    fn part(&self, round: &Round) -> Result<Part, RoundError> {
        let layer = round.layer;
        self.entry(layer)?;
        let uses = self.program.layer(layer).uses.len();
        let of_layer =
            round.peaks.iter().zip(0..).all(|(peak, index)| (peak.layer, peak.use_index) == (layer, index));
        if round.peaks.len() != uses || !of_layer {
            let (number, found) = (round.number, round.peaks.len());
            return Err(RoundError::Peaks { number, expected: uses, found });
        }
        if !round.shards.is_empty() {
            return Ok(Part::Own);
        }
        let empty = |peak: &PeakRecord| self.begun_statistics((layer, peak.use_index), peak);
        let empty: Result<Option<Vec<_>>, Failure> = round.peaks.iter().map(empty).collect();
        Ok(empty?.map_or(Part::NotFinite, Part::Zeros))
    }

    /// None if the inputs are not finite.
    fn slice_of(&self, part: &Part, round: &Round, slice: SliceId) -> Result<Option<SumSlice>, RoundError> {
        match part {
            Part::NotFinite => Ok(None),
            Part::Own => Ok(self.own_sums(round.layer, slice, &round.shards)?),
            Part::Zeros(uses) => {
                let rows = self.rows(round.layer, slice)?;
                let uses: Result<Vec<UseSlice>, ExecError> =
                    uses.iter().map(|one| one.slice(rows.clone())).collect();
                Ok(Some(SumSlice { cols: self.program.layer(round.layer).cols, rows, uses: uses? }))
            }
        }
    }

    /// Whether all members are at the same round of the same layer, with the same exponents.
    fn agree(
        &self,
        epoch: u64,
        round: &Round,
        first: Option<&SumSlice>,
        group: &mut Communicator,
        patience: &Patience<'_>,
    ) -> Result<(), RoundError> {
        let digest = digest(epoch, round, first);
        let size = group.place().size as i64;
        let mut sum = digest;
        group.all_reduce(&mut sum, patience)?;
        match sum == digest.map(|word| word.wrapping_mul(size)) {
            true => Ok(()),
            false => Err(RoundError::Differs { number: round.number }),
        }
    }
}

/// What members must have in common.
fn digest(epoch: u64, round: &Round, first: Option<&SumSlice>) -> [i64; 4] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&round.job.0);
    let mut number = |value: u64| {
        hasher.update(&value.to_le_bytes());
    };
    number(epoch);
    number(round.number);
    number(u64::from(round.layer.0));
    for one in first.iter().flat_map(|slice| &slice.uses) {
        let (c, g) = one.exponents.cross.unwrap_or((i32::MIN, i32::MIN));
        number(one.positions);
        number(one.sums.len() as u64);
        for exponent in [one.exponents.h, c, g] {
            number(exponent as u64);
        }
    }
    let hash = hasher.finalize();
    let (words, _) = hash.as_bytes().as_chunks::<8>();
    [0, 1, 2, 3].map(|word: usize| i64::from_le_bytes(words[word]))
}
