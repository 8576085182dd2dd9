//! Summing one slice of a layer's statistics over all nodes that hold a part.
//!
//! Behind an interface, since the same integers can be added by other means (by a group of nodes: `exchange`). This one
//! fetches the slice from every holder: the nodes that reduce a layer's slices together scatter its sums, and those that
//! solve it gather the means, so that no node receives all partial sums of a layer.
//! Not here: who reduces which slice (the coordinator), means (`means`).

use crate::attempt::Attempt;
use crate::failure;
use crate::job::Job;
use halfstep_exec::{SumSlice, decode_sums};
use halfstep_work::{Failure, Held, Holding, LayerId, SegmentId, ShardId, SliceId, Wanted};

/// Sums slices over nodes. Integers are exact, so every implementation gives the same.
pub(crate) trait Collective {
    /// The sums of all shards over one slice; `None` if the layer's inputs are not finite.
    ///
    /// # Errors
    /// `PeerLost` if a holder does not have its part any more, `Damaged` if what came is not that part.
    fn sum(&self, layer: LayerId, slice: SliceId) -> Result<Option<SumSlice>, Failure>;
}

/// By fetching from every holder that the grant names.
pub(crate) struct FetchCollective<'a> {
    pub(crate) job: &'a Job,
    pub(crate) attempt: &'a Attempt<'a>,
}

impl Collective for FetchCollective<'_> {
    fn sum(&self, layer: LayerId, slice: SliceId) -> Result<Option<SumSlice>, Failure> {
        let stage = self.job.entry(layer)?.stage;
        let mut sum: Option<SumSlice> = None;
        for (holder, own, shards) in holders(self.job, self.attempt, stage)? {
            let part = match own {
                true => self.job.own_sums(layer, slice, shards)?,
                false => self.fetch(holder, layer, slice, shards)?,
            };
            let Some(part) = part else { return Ok(None) };
            match &mut sum {
                Some(sum) => sum.add(&part).map_err(failure::exec)?,
                None => sum = Some(part),
            }
        }
        Ok(sum)
    }
}

impl FetchCollective<'_> {
    fn fetch(
        &self,
        holder: &Holding,
        layer: LayerId,
        slice: SliceId,
        shards: &[ShardId],
    ) -> Result<Option<SumSlice>, Failure> {
        let wanted = Wanted::SumsSlice { layer, slice, shards: shards.to_vec() };
        let bytes = self.attempt.fetch(self.job.source().as_ref(), holder, &wanted)?;
        decode_sums(&bytes, &self.job.form(layer), self.job.rows(layer, slice)?).map_err(failure::exec)
    }
}

/// Who, whether it is this node, and the shards that are in its sums.
type Holder<'a> = (&'a Holding, bool, &'a [ShardId]);

/// The holders of a stage's sums, which must have every shard of the plan once.
///
/// # Errors
/// `PeerLost` if shards are missing or there twice: the grant was made of what is no longer so.
pub(crate) fn holders<'a>(
    job: &Job,
    attempt: &'a Attempt<'_>,
    stage: SegmentId,
) -> Result<Vec<Holder<'a>>, Failure> {
    let found: Vec<_> = attempt
        .holdings(|held| match held {
            Held::Sums { segment, shards } if *segment == stage => Some(shards.as_slice()),
            _ => None,
        })
        .collect();
    let mut shards: Vec<ShardId> = found.iter().flat_map(|(_, _, shards)| shards.iter().copied()).collect();
    shards.sort_unstable();
    if !shards.iter().copied().eq(job.plan.shard_ids()) {
        let (all, named) = (job.plan.shards.len(), shards.len());
        return Err(failure::peer(format!(
            "sums of {stage}: {named} shards are named, expected each of {all} once"
        )));
    }
    Ok(found)
}
