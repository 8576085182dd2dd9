//! From sums to a layer's problem: slices reduced to means here, gathered from wherever they were reduced, and solved.
//!
//! Means are gathered once per node, by the first chunk of the layers that share them; the others wait for it. They are held
//! once: slices become the layer's matrices, which chunks are solved with and other nodes are answered from.
//! Not here: adding integers (`collective`), the mathematics (`layer_problem`, `solver`).

use crate::attempt::Attempt;
use crate::collective::{Collective, FetchCollective, holders};
use crate::failure;
use crate::job::{Job, lock};
use crate::layer_problem::{Gathered, LayerProblem};
use halfstep_exec::{LayerMeans, MeanSlice, ShardSamples, add_samples, decode_means, decode_samples};
use halfstep_work::{ChunkId, Done, Failure, FailureClass, Held, LayerId, Objective, SliceId, Wanted};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// What is here of a layer's means.
pub(crate) struct HeldMeans {
    /// Slices that were reduced here; others may have been fetched.
    own: BTreeSet<SliceId>,
    place: Place,
}

enum Place {
    Parts(LayerMeans),
    Whole(Arc<Gathered>),
}

impl HeldMeans {
    fn new(cols: usize, groups: usize) -> Self {
        Self { own: BTreeSet::new(), place: Place::Parts(LayerMeans::new(cols, groups)) }
    }

    fn means(&self) -> &LayerMeans {
        match &self.place {
            Place::Parts(means) => means,
            Place::Whole(gathered) => gathered.means(),
        }
    }

    /// Adds a slice unless it is here.
    fn place(&mut self, slice: Arc<MeanSlice>) -> Result<(), Failure> {
        match &mut self.place {
            Place::Parts(means) if !means.has(&slice.rows) => means.place(slice).map_err(failure::exec),
            _ => Ok(()),
        }
    }

    /// What was reduced here.
    pub(crate) fn own(&self) -> impl Iterator<Item = SliceId> {
        self.own.iter().copied()
    }

    pub(crate) fn own_slice(&self, slice: SliceId, rows: Range<usize>) -> Option<MeanSlice> {
        self.means().slice(rows).filter(|_| self.own.contains(&slice))
    }
}

impl Job {
    /// Sums a slice over all nodes and keeps its means.
    pub(crate) fn reduce(&self, attempt: &Attempt<'_>, id: LayerId, slice: SliceId) -> Result<Done, Failure> {
        let means = match self.together.means(attempt, id, slice)? {
            Some(means) => means,
            None => self.reduce_alone(attempt, id, slice)?,
        };
        let held = self.held_means(id);
        let mut held = lock(&held);
        held.place(means)?;
        held.own.insert(slice);
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

    fn held_means(&self, id: LayerId) -> Arc<Mutex<HeldMeans>> {
        let layer = self.program.layer(id);
        let begin = || Arc::new(Mutex::new(HeldMeans::new(layer.cols, layer.groups)));
        Arc::clone(lock(&self.means).entry(id).or_insert_with(begin))
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
        let solved = self
            .devices
            .with(&layer.name, |lane| problem.solve(id, chunk, rows, layer, solver, lane, attempt));
        let (rounding, refine_seconds) = solved?;
        Ok((Done::Solved(Arc::new(rounding)), refine_seconds))
    }

    fn problem(&self, attempt: &Attempt<'_>, id: LayerId) -> Result<LayerProblem, Failure> {
        let statistics = self.plan.statistics_of(id);
        // Where means are complete every shard is through.
        self.sessions.passed(self.entry(id)?.stage);
        let slot = Arc::clone(lock(&self.gathered).entry(statistics).or_default());
        let (layer, scales) = (self.program.layer(id), self.program.scales());
        let gathered = slot.get_or_make(|| self.gather(attempt, statistics))?;
        LayerProblem::new(self.entry(id)?, layer, self.source().as_ref(), gathered, scales)
    }

    /// A layer's own statistics, from all slices.
    fn gather(&self, attempt: &Attempt<'_>, id: LayerId) -> Result<Arc<Gathered>, Failure> {
        let held = self.held_means(id);
        for slice in self.plan.slice_ids(id) {
            let rows = self.rows(id, slice)?;
            if !lock(&held).means().has(&rows) {
                // No lock while others are asked: they may be asking for what is here.
                let came = match self.together.means(attempt, id, slice)? {
                    Some(means) => means,
                    None => Arc::new(self.fetch_means(attempt, id, slice, rows)?),
                };
                lock(&held).place(came)?;
            }
        }
        let samples = match self.plan.solver.objective {
            Objective::Samples => self.gather_samples(attempt, id)?,
            Objective::Gram => Vec::new(),
        };
        let mut held = lock(&held);
        let mut means = match &mut held.place {
            Place::Whole(gathered) => return Ok(Arc::clone(gathered)),
            Place::Parts(means) => {
                means.complete(self.threads).map_err(failure::exec)?;
                std::mem::take(means)
            }
        };
        // Every slice has been reduced: nobody else comes for these.
        self.together.forget(|layer| layer == id);
        add_samples(means.groups_mut(), &samples);
        let gathered = Arc::new(Gathered::new(means));
        held.place = Place::Whole(Arc::clone(&gathered));
        Ok(gathered)
    }

    /// A slice from the first of its holders that has it.
    fn fetch_means(
        &self,
        attempt: &Attempt<'_>,
        id: LayerId,
        slice: SliceId,
        rows: Range<usize>,
    ) -> Result<MeanSlice, Failure> {
        let mut lost = failure::peer(format!("means of {id}, {slice}: nobody is named who has them"));
        let named = attempt.holdings(|held| (*held == Held::Means { layer: id, slice }).then_some(()));
        for (holder, _, ()) in named.filter(|(_, own, ())| !own) {
            match attempt.fetch(self.source().as_ref(), holder, &Wanted::MeansSlice { layer: id, slice }) {
                Ok(bytes) => return decode_means(&bytes, &self.form(id), rows).map_err(failure::exec),
                Err(failure) if failure.class == FailureClass::Cancelled => return Err(failure),
                Err(failure) => lost = failure,
            }
        }
        Err(lost)
    }

    /// Sample rows of all shards in ascending order, as if one node had them all; one entry per use.
    fn gather_samples(
        &self,
        attempt: &Attempt<'_>,
        id: LayerId,
    ) -> Result<Vec<BTreeMap<u32, ShardSamples>>, Failure> {
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
        Ok(uses)
    }
}
