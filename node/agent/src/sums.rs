//! Sums of products of the shards that the coordinator has counted as this node's.
//!
//! `Accumulate` leaves a shard's products under its lease; they enter the sums of the stage when the coordinator accepts
//! them and are dropped otherwise. So the shards that are in a stage's sums are exactly those it counts on, and each
//! shard is in the sums of one node.
//! Products and sums are wherever the node's devices keep them (`devices`): a layer's always on the same kind.
//! Not here: the integers (`exec`), adding nodes (`collective`).

use crate::attempt::Attempt;
use crate::devices::Lane;
use crate::failure;
use crate::job::{Job, lock};
use crate::replay::LaneShard;
use crate::room::Share;
use halfstep_exec::{
    Agreement, ExecError, LayerStatistics, Sampling, ShardProducts, ShardSamples, SliceForm, Stream,
    SumSlice, UseSlice,
};
use halfstep_model::Tap;
use halfstep_work::{
    Done, Failure, Held, LayerId, LeaseId, Objective, PeakRecord, SegmentId, ShardId, SliceId, Verdict,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long others wait for a verdict that must be on its way: they were told of it before this node was.
const VERDICT_WAIT: Duration = Duration::from_secs(2);

/// One use of a layer.
type Use = (LayerId, u32);

/// Sums of every stage that is not over, and products that wait for a verdict.
#[derive(Default)]
pub(crate) struct Sums {
    stages: BTreeMap<SegmentId, Stage>,
    pending: HashMap<LeaseId, Pending>,
}

#[derive(Default)]
struct Stage {
    shards: BTreeSet<ShardId>,
    /// `None` where the inputs are not finite.
    uses: BTreeMap<Use, Option<Arc<LayerStatistics>>>,
    /// Why the sums are worth nothing: a device failed while a shard was added.
    lost: Option<String>,
}

struct Pending {
    segment: SegmentId,
    shard: ShardId,
    products: Vec<(Use, Option<Products>)>,
    _memory: Vec<Share>,
}

/// One use's products, and empty sums to begin with.
type Products = (Arc<LayerStatistics>, ShardProducts);

impl Sums {
    /// What became of a lease; of no account unless products wait under it.
    pub(crate) fn settle(&mut self, lease: LeaseId, verdict: Verdict) {
        let Some(pending) = self.pending.remove(&lease).filter(|_| verdict == Verdict::Accepted) else {
            return;
        };
        let stage = self.stages.entry(pending.segment).or_default();
        if !stage.shards.insert(pending.shard) {
            return;
        }
        for (one, products) in pending.products {
            let empty = products.as_ref().map(|(statistics, _)| Arc::clone(statistics));
            let kept = stage.uses.entry(one).or_insert(empty);
            if let (Some(kept), Some((_, products))) = (kept, products)
                && let Err(error) = kept.merge(products)
            {
                tracing::error!(segment = %pending.segment, %error, "sums are lost");
                stage.lost = Some(error.to_string());
            }
        }
    }

    pub(crate) fn drop_stages(&mut self, passed: impl Fn(SegmentId) -> bool) {
        self.stages.retain(|segment, _| !passed(*segment));
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Sums of at least one shard.
    pub(crate) fn held(&self) -> impl Iterator<Item = Held> {
        let filled = self.stages.iter().filter(|(_, stage)| !stage.shards.is_empty());
        filled.map(|(segment, stage)| Held::Sums {
            segment: *segment,
            shards: stage.shards.iter().copied().collect(),
        })
    }

    /// Whether exactly these shards will be in once verdicts on waiting products have come.
    fn may_become(&self, stage: SegmentId, shards: &[ShardId]) -> bool {
        let held = self.stages.get(&stage).map(|held| &held.shards);
        let waits = |shard: &ShardId| {
            self.pending.values().any(|pending| (pending.segment, pending.shard) == (stage, *shard))
        };
        let missing = shards.iter().filter(|shard| held.is_none_or(|held| !held.contains(shard)));
        held.is_none_or(|held| held.iter().all(|shard| shards.contains(shard)))
            && missing.map(waits).reduce(|all, one| all && one).unwrap_or(false)
    }

    /// A layer's uses, if exactly these shards are in. An empty answer: its inputs are not finite.
    fn uses(
        &self,
        stage: SegmentId,
        layer: LayerId,
        shards: &[ShardId],
    ) -> Result<Vec<Arc<LayerStatistics>>, Failure> {
        let held = self.stages.get(&stage).filter(|held| held.shards.iter().eq(shards));
        let held = held.ok_or_else(|| {
            let actual = self.stages.get(&stage).map_or(0, |held| held.shards.len());
            failure::peer(format!(
                "sums of {stage}: asked for {} other shards, {actual} are in",
                shards.len()
            ))
        })?;
        if let Some(reason) = &held.lost {
            return Err(failure::lost(format!("sums of {stage} are lost: {reason}")));
        }
        let uses: Option<Vec<_>> =
            held.uses.range((layer, 0)..=(layer, u32::MAX)).map(|(_, one)| one.clone()).collect();
        Ok(uses.unwrap_or_default())
    }
}

impl Job {
    /// Sums the products of one shard's taps and leaves them under the lease.
    pub(crate) fn accumulate(
        &self,
        attempt: &Attempt<'_>,
        id: SegmentId,
        shard: ShardId,
        peaks: &[PeakRecord],
    ) -> Result<Done, Failure> {
        let segment = self.program.segment(id.index())?;
        // All shards are through, unless lanes of later ranges still pass.
        if self.plan.ranges.len() == 1 {
            self.sessions.passed(id);
        }
        // Before the shard is brought here: who waits for memory must not keep others from the shard.
        let forms: Vec<SliceForm> =
            segment.taps.iter().map(|tap| self.form(LayerId(tap.layer as u32))).collect();
        let memory = self.rooms.take(&forms, attempt)?;
        let lane = (self.plan.range_of(id), shard);
        let products = self.at(attempt, lane, id.index() + 1, || {
            self.devices.with("statistics", |device| {
                segment.taps.iter().map(|tap| self.products(attempt, device, lane, tap, peaks)).collect()
            })
        })?;
        let pending = Pending { segment: id, shard, products, _memory: memory };
        lock(&self.sums).pending.insert(attempt.grant.lease.id, pending);
        Ok(Done::Accumulated)
    }

    fn products(
        &self,
        attempt: &Attempt<'_>,
        device: &mut Lane,
        lane: LaneShard,
        tap: &Tap,
        peaks: &[PeakRecord],
    ) -> Result<(Use, Option<Products>), Failure> {
        attempt.step()?;
        let layer = LayerId(tap.layer as u32);
        let one = (layer, tap.use_index as u32);
        let agreed = peaks.iter().find(|p| (p.layer, p.use_index) == one);
        let agreed = agreed.ok_or_else(|| failure::internal(format!("{layer}: no peaks were agreed")))?;
        let Some(statistics) = self.begun_statistics(one, agreed)? else { return Ok((one, None)) };
        let fp = self.carried(lane, Stream::FullPrecision, &tap.tensor)?;
        let differs = self.program.differs(&self.plan, layer);
        let q = differs.then(|| self.carried(lane, Stream::Quantized, &tap.tensor)).transpose()?;
        let described = self.program.layer(layer);
        let summing = device.summing(described.cols, self.program.carries());
        let summing = summing.map_err(|error| failure::device(&described.name, &error))?;
        let products = statistics.products(summing, described, &tap.tensor, lane.1.0, &fp, q.as_ref());
        let products = products.map_err(|error| match error {
            ExecError::Device(error) => failure::device(&described.name, &error),
            other => failure::exec(other),
        })?;
        Ok((one, Some((statistics, products))))
    }

    /// Empty sums of one use, to be begun with if there are none when the verdict comes: those of now may be dropped until
    /// then, and what was in them must not come back. Nothing if they would not be finite: then the layer fails alone
    /// when it is reduced.
    pub(crate) fn begun_statistics(
        &self,
        one: Use,
        agreed: &PeakRecord,
    ) -> Result<Option<Arc<LayerStatistics>>, Failure> {
        match self.empty_statistics(one.0, agreed) {
            Ok(made) => Ok(Some(Arc::new(made))),
            Err(ExecError::NonFinite { .. }) => Ok(None),
            Err(error) => Err(failure::exec(error)),
        }
    }

    fn empty_statistics(&self, layer: LayerId, agreed: &PeakRecord) -> Result<LayerStatistics, ExecError> {
        let solver = &self.plan.solver;
        let keep =
            if solver.objective == Objective::Samples { solver.positions_per_shard as usize } else { 0 };
        let sampling =
            Sampling { fraction: solver.positions_fraction, keep_per_shard: keep, seed: solver.seed };
        let agreement = Agreement {
            peak_fp: agreed.full_precision,
            peak_q: agreed.quantized,
            positions: agreed.positions,
        };
        let same = !self.program.differs(&self.plan, layer);
        LayerStatistics::new(self.program.layer(layer), u64::from(layer.0), agreement, sampling, same)
    }

    /// What became of a lease.
    pub(crate) fn settle(&self, lease: LeaseId, verdict: Verdict) {
        {
            let _alone = self.summed.write().unwrap_or_else(PoisonError::into_inner);
            lock(&self.sums).settle(lease, verdict);
        }
        self.settled.notify_all();
    }

    /// The sums, after a short wait for these shards if they are about to be in.
    fn settled_sums(&self, stage: SegmentId, shards: &[ShardId]) -> MutexGuard<'_, Sums> {
        let deadline = Instant::now() + VERDICT_WAIT;
        let mut sums = lock(&self.sums);
        while sums.may_become(stage, shards) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            sums = self.settled.wait_timeout(sums, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        sums
    }

    /// Rows of this node's sums over exactly these shards; `None` if the layer's inputs are not finite.
    pub(crate) fn own_sums(
        &self,
        layer: LayerId,
        slice: SliceId,
        shards: &[ShardId],
    ) -> Result<Option<SumSlice>, Failure> {
        let (stage, rows) = (self.entry(layer)?.stage, self.rows(layer, slice)?);
        drop(self.settled_sums(stage, shards));
        // Held while the rows are read: a shard that is merged meanwhile would be in some rows only.
        let _same = self.summed.read().unwrap_or_else(PoisonError::into_inner);
        let uses = lock(&self.sums).uses(stage, layer, shards)?;
        if uses.is_empty() {
            return Ok(None);
        }
        let uses: Result<Vec<UseSlice>, ExecError> = uses.iter().map(|one| one.slice(rows.clone())).collect();
        let cols = self.program.layer(layer).cols;
        Ok(Some(SumSlice { cols, rows, uses: uses.map_err(failure::exec)? }))
    }

    /// Kept sample rows of this node's sums over exactly these shards, one entry per use.
    pub(crate) fn own_samples(
        &self,
        layer: LayerId,
        shards: &[ShardId],
    ) -> Result<Vec<BTreeMap<u32, ShardSamples>>, Failure> {
        let stage = self.entry(layer)?.stage;
        let sums = self.settled_sums(stage, shards);
        Ok(sums.uses(stage, layer, shards)?.iter().map(|one| one.kept()).collect())
    }
}
