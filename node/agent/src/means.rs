//! From sums to a layer's problem: slices reduced to means here, gathered from wherever they were reduced, and solved.
//!
//! Means are gathered once per node, by the first chunk of the layers that share them; the others wait for it.
//! Not here: adding integers (`collective`), the mathematics (`layer_problem`, `solver`).

use crate::attempt::Attempt;
use crate::collective::{Collective, FetchCollective, holders};
use crate::failure;
use crate::job::{Job, lock};
use crate::layer_problem::{Gathered, LayerProblem};
use halfstep_exec::{
    GroupMeans, MeanSlice, ShardSamples, add_samples, assemble, decode_means, decode_samples,
};
use halfstep_work::{ChunkId, Done, Failure, FailureClass, Held, LayerId, Objective, SliceId, Wanted};
use std::collections::BTreeMap;
use std::sync::Arc;

impl Job {
    /// Sums a slice over all nodes and keeps its means.
    pub(crate) fn reduce(&self, attempt: &Attempt<'_>, id: LayerId, slice: SliceId) -> Result<Done, Failure> {
        let means = match self.together.means(attempt, id, slice)? {
            Some(means) => means,
            None => self.reduce_alone(attempt, id, slice)?,
        };
        lock(&self.means).insert((id, slice), means);
        Ok(Done::Reduced)
    }

    fn reduce_alone(
        &self,
        attempt: &Attempt<'_>,
        id: LayerId,
        slice: SliceId,
    ) -> Result<Arc<MeanSlice>, Failure> {
        let sum = FetchCollective { job: self, attempt }.sum(id, slice)?;
        let message = "the inputs are not finite on the calibration data";
        let sum = sum.ok_or_else(|| Failure::new(FailureClass::NonFinite, message))?;
        Ok(Arc::new(sum.means().map_err(failure::exec)?))
    }

    /// Decides one chunk; also the seconds spent refining.
    pub(crate) fn solve(
        &self,
        attempt: &Attempt<'_>,
        id: LayerId,
        chunk: ChunkId,
    ) -> Result<(Done, f64), Failure> {
        let rows = self.entry(id)?.chunks.get(chunk.index()).cloned();
        let rows = rows.ok_or_else(|| failure::internal(format!("{id} {chunk}: not in the plan")))?;
        let slot = Arc::clone(lock(&self.problems).entry(id).or_default());
        let problem = slot.get_or_make(|| self.problem(attempt, id).map(Arc::new))?;
        let (layer, solver) = (self.program.layer(id), &self.plan.solver);
        let mut lane = self.devices.take().map_err(|error| failure::device(&layer.name, &error))?;
        let solved = problem.solve(id, chunk, rows, layer, solver, &mut lane, attempt);
        // A lane whose solve failed may have work queued: it ends with the lane. Where memory was short, so do the idle ones.
        match &solved {
            Ok(_) => self.devices.give_back(lane),
            Err(failed) if failed.class == FailureClass::OutOfMemory => self.devices.release(),
            Err(_) => {}
        }
        let (rounding, refine_seconds) = solved?;
        Ok((Done::Solved(Arc::new(rounding)), refine_seconds))
    }

    fn problem(&self, attempt: &Attempt<'_>, id: LayerId) -> Result<LayerProblem, Failure> {
        let statistics = self.plan.statistics_of(id);
        let slot = Arc::clone(lock(&self.gathered).entry(statistics).or_default());
        let (layer, scales) = (self.program.layer(id), self.program.scales());
        let gathered = slot.get_or_make(|| self.gather(attempt, statistics).map(Arc::new))?;
        LayerProblem::new(self.entry(id)?, layer, self.source().as_ref(), gathered, scales)
    }

    /// A layer's own statistics, from all slices.
    fn gather(&self, attempt: &Attempt<'_>, id: LayerId) -> Result<Gathered, Failure> {
        let slices: Result<Vec<_>, Failure> =
            self.plan.slice_ids(id).map(|slice| self.mean_slice(attempt, id, slice)).collect();
        let slices = slices?;
        let layer = self.program.layer(id);
        let positions = slices.first().map_or(0, |slice| slice.positions);
        let mut groups = assemble(layer.cols, layer.groups, &slices).map_err(failure::exec)?;
        drop(slices);
        // Every slice has been reduced: nobody else comes for these.
        self.together.forget(|layer| layer == id);
        if self.plan.solver.objective == Objective::Samples {
            self.gather_samples(attempt, id, &mut groups)?;
        }
        Ok(Gathered::new(groups, positions))
    }

    /// A slice reduced here or by the node's group, or from the first of its holders that has it.
    fn mean_slice(
        &self,
        attempt: &Attempt<'_>,
        id: LayerId,
        slice: SliceId,
    ) -> Result<Arc<MeanSlice>, Failure> {
        if let Some(own) = lock(&self.means).get(&(id, slice)) {
            return Ok(Arc::clone(own));
        }
        if let Some(together) = self.together.means(attempt, id, slice)? {
            return Ok(together);
        }
        let mut lost = failure::peer(format!("means of {id}, {slice}: nobody is named who has them"));
        let named = attempt.holdings(|held| (*held == Held::Means { layer: id, slice }).then_some(()));
        for (holder, _, ()) in named.filter(|(_, own, ())| !own) {
            match attempt.fetch(self.source().as_ref(), holder, &Wanted::MeansSlice { layer: id, slice }) {
                Ok(bytes) => {
                    let means = decode_means(&bytes, &self.form(id), self.rows(id, slice)?);
                    return means.map(Arc::new).map_err(failure::exec);
                }
                Err(failure) if failure.class == FailureClass::Cancelled => return Err(failure),
                Err(failure) => lost = failure,
            }
        }
        Err(lost)
    }

    /// Sample rows of all shards in ascending order, as if one node had them all.
    fn gather_samples(
        &self,
        attempt: &Attempt<'_>,
        id: LayerId,
        groups: &mut [GroupMeans],
    ) -> Result<(), Failure> {
        let stage = self.entry(id)?.stage;
        let mut uses: Vec<BTreeMap<u32, ShardSamples>> =
            vec![BTreeMap::new(); self.program.layer(id).uses.len()];
        for (holder, own, shards) in holders(self, attempt, stage)? {
            let parts = match own {
                true => self.own_samples(id, shards)?,
                false => {
                    let wanted = Wanted::Samples { layer: id, shards: shards.to_vec() };
                    let bytes = attempt.fetch(self.source().as_ref(), holder, &wanted)?;
                    let shards: Vec<u32> = shards.iter().map(|shard| shard.0).collect();
                    decode_samples(&bytes, &self.form(id), &shards).map_err(failure::exec)?
                }
            };
            for (all, part) in uses.iter_mut().zip(parts) {
                all.extend(part);
            }
        }
        add_samples(groups, &uses);
        Ok(())
    }
}
