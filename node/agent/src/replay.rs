//! Carries on their way through the segments: from what is here, from another node, or from the input.
//!
//! A lane is a range's pair of streams; each of its shards is at one boundary, the number of segments that have run. Up
//! to the range's start there is the original model alone. At a boundary inside the range the taps of the segment
//! before are kept too, until the shard moves on, so that any task of that segment can be done again.
//! A step is a function of plan, input and committed roundings: the way a carry came here never shows in it.
//! One task at a time moves a shard of a lane; others may read meanwhile and see one boundary or nothing.
//! Not here: what is done with the taps (`sums`), when a step is due (the coordinator).

use crate::attempt::Attempt;
use crate::carry_wire::{self, Live};
use crate::job::{Job, lock};
use crate::{failure, transit};
use bytes::Bytes;
use halfstep_exec::{Carried, CarryKey, Session, Stream, Unfolder, sampled_positions};
use halfstep_model::{Layer, Segment, Tensor};
use halfstep_work::{
    ChunkId, Done, Failure, FailureClass, Held, Holding, LayerId, PeakRecord, RangeId, SegmentId, ShardId,
    Wanted,
};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

/// A shard of a lane.
pub(crate) type LaneShard = (RangeId, ShardId);

/// Where every shard of every lane is.
#[derive(Default)]
pub(crate) struct Lanes {
    /// Held by the task that moves the shard.
    moving: Mutex<HashMap<LaneShard, Arc<Mutex<()>>>>,
    boundaries: Mutex<BTreeMap<LaneShard, usize>>,
}

impl Lanes {
    fn mover(&self, lane: LaneShard) -> Arc<Mutex<()>> {
        Arc::clone(lock(&self.moving).entry(lane).or_default())
    }

    fn boundary(&self, lane: LaneShard) -> Option<usize> {
        lock(&self.boundaries).get(&lane).copied()
    }

    fn set(&self, lane: LaneShard, boundary: Option<usize>) {
        let mut boundaries = lock(&self.boundaries);
        match boundary {
            Some(at) => boundaries.insert(lane, at),
            None => boundaries.remove(&lane),
        };
    }

    /// All of them.
    pub(crate) fn all(&self) -> BTreeMap<LaneShard, usize> {
        lock(&self.boundaries).clone()
    }
}

fn key((range, shard): LaneShard, stream: Stream, tensor: &str) -> CarryKey {
    CarryKey { lane: range.0, stream, tensor: tensor.into(), shard: shard.0 }
}

impl Job {
    /// Brings the next range's lane to its start.
    pub(crate) fn forward(
        &self,
        attempt: &Attempt<'_>,
        range: RangeId,
        shard: ShardId,
    ) -> Result<Done, Failure> {
        let next = RangeId(range.0 + 1);
        let stages = self.plan.ranges.get(next.index());
        let start = stages.ok_or_else(|| failure::internal(format!("{range}: no range follows it")))?.start;
        self.at(attempt, (next, shard), start, || Ok(Done::Forwarded))
    }

    /// Brings the shard behind the segment and reports what its taps reach.
    pub(crate) fn capture(
        &self,
        attempt: &Attempt<'_>,
        id: SegmentId,
        shard: ShardId,
    ) -> Result<Done, Failure> {
        let segment = self.program.segment(id.index())?;
        let lane = (self.plan.range_of(id), shard);
        let peaks = self.at(attempt, lane, id.index() + 1, || {
            let taps = segment.taps.iter();
            taps.map(|tap| self.peak(lane, tap.layer, tap.use_index, &tap.tensor))
                .collect::<Result<Vec<_>, _>>()
        })?;
        lock(&self.captured).insert(lane, (id, peaks.clone()));
        Ok(Done::Captured { peaks })
    }

    /// Does something with a shard of a lane at a boundary, which it is brought to first.
    pub(crate) fn at<T>(
        &self,
        attempt: &Attempt<'_>,
        lane: LaneShard,
        boundary: usize,
        then: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.check_shard(lane.1)?;
        let mover = self.lanes.mover(lane);
        let _moving = lock(&mover);
        let done = self.bring(attempt, lane, boundary).and_then(|()| then());
        if done.as_ref().is_err_and(|failure| failure.class == FailureClass::Damaged) {
            // What is here cannot be read: the next attempt begins with a copy elsewhere, or the input.
            self.settle_at(lane, None);
        }
        done
    }

    fn bring(&self, attempt: &Attempt<'_>, lane: LaneShard, target: usize) -> Result<(), Failure> {
        if self.lanes.boundary(lane).is_some_and(|at| at > target) {
            self.settle_at(lane, None);
        }
        self.fetch_nearest(attempt, lane, target);
        self.borrow_nearest(lane, target)?;
        let begin = self.lanes.boundary(lane).unwrap_or(0);
        for index in begin..target {
            attempt.step()?;
            if let Err(failure) = self.run_segment(lane, SegmentId(index as u32)) {
                if failure.class == FailureClass::OutOfMemory {
                    self.devices.release();
                }
                // What a broken step left behind is no part of the boundary it began from.
                self.settle_at(lane, self.lanes.boundary(lane));
                return Err(failure);
            }
            self.settle_at(lane, Some(index + 1));
        }
        Ok(())
    }

    /// Names the boundary, then drops what is not of it: readers look at the name before and after they read.
    fn settle_at(&self, lane: LaneShard, boundary: Option<usize>) {
        self.lanes.set(lane, boundary);
        let names = self.program.carried(&self.plan, lane.0, boundary.unwrap_or(0));
        self.carry.retain(lane.0.0, lane.1.0, |key| names.contains(key.tensor.as_str()));
    }

    /// Takes over a carry from another node if it is further than what is here. A holder that fails is passed over: the
    /// input is always there.
    fn fetch_nearest(&self, attempt: &Attempt<'_>, lane: LaneShard, target: usize) {
        let (range, shard) = lane;
        let offered = attempt.holdings(|held| match held {
            Held::Carry { range: r, segment, shard: s } if (*r, *s) == (range, shard) => {
                Some(segment.index() + 1)
            }
            _ => None,
        });
        let mut offered: Vec<(&Holding, usize)> = offered
            .filter(|(_, own, boundary)| !own && *boundary <= target)
            .map(|(holding, _, boundary)| (holding, boundary))
            .collect();
        offered.sort_by_key(|(_, boundary)| std::cmp::Reverse(*boundary));
        for (holder, boundary) in offered {
            if self.lanes.boundary(lane).is_some_and(|at| at >= boundary) {
                return;
            }
            if self.fetch_carry(attempt, holder, lane, boundary).is_ok() {
                return;
            }
        }
    }

    fn fetch_carry(
        &self,
        attempt: &Attempt<'_>,
        holder: &Holding,
        lane: LaneShard,
        boundary: usize,
    ) -> Result<(), Failure> {
        self.adopt_from(lane, boundary, |wanted| attempt.fetch(self.source().as_ref(), holder, wanted))
    }

    fn adopt_from(
        &self,
        lane: LaneShard,
        boundary: usize,
        fetch: impl FnOnce(&Wanted) -> Result<Bytes, Failure>,
    ) -> Result<(), Failure> {
        let (range, shard) = lane;
        let segment = SegmentId((boundary - 1) as u32);
        let bytes = fetch(&Wanted::Carry { range, segment, shard })?;
        let live = carry_wire::decode(&bytes, (range, segment, shard))?;
        self.check_live(lane, boundary, &live)?;
        self.adopt(lane, boundary, live)
    }

    /// Takes over a carry from a node that leaves, unless what is here is as far or further.
    ///
    /// # Errors
    /// `PeerLost` or `Damaged` if it cannot be had, `Internal` for what is no carry of this plan.
    pub(crate) fn take_over(&self, holder: &Holding) -> Result<(), Failure> {
        let Held::Carry { range, segment, shard } = holder.held else {
            return Err(failure::internal("only carries are taken over"));
        };
        self.check_shard(shard)?;
        self.program.segment(segment.index())?;
        if range.index() >= self.plan.ranges.len() {
            return Err(failure::internal(format!("{range}: the plan has {}", self.plan.ranges.len())));
        }
        let (lane, boundary) = ((range, shard), segment.index() + 1);
        let mover = self.lanes.mover(lane);
        let _moving = lock(&mover);
        match self.lanes.boundary(lane) {
            Some(at) if at >= boundary => Ok(()),
            _ => self.adopt_from(lane, boundary, |wanted| {
                self.source().held(holder, wanted).map_err(failure::source)
            }),
        }
    }

    /// Exactly the tensors that a carry of this boundary has.
    fn check_live(&self, lane: LaneShard, boundary: usize, live: &[Live]) -> Result<(), Failure> {
        let mut expected = self.keys_at(lane, boundary);
        let mut found: Vec<CarryKey> =
            live.iter().map(|(stream, name, _)| key(lane, *stream, name)).collect();
        expected.sort();
        found.sort();
        match expected == found {
            true => Ok(()),
            false => Err(failure::peer(format!("carry of {} at {boundary}: not the tensors it has", lane.1))),
        }
    }

    fn keys_at(&self, lane: LaneShard, boundary: usize) -> Vec<CarryKey> {
        let inside = self.plan.ranges.get(lane.0.index()).is_some_and(|range| boundary > range.start);
        let names = self.program.carried(&self.plan, lane.0, boundary);
        let parted = names.iter().filter(|name| inside && self.program.is_parted(lane.0, name));
        let quantized = parted.map(|name| key(lane, Stream::Quantized, name));
        names.iter().map(|name| key(lane, Stream::FullPrecision, name)).chain(quantized).collect()
    }

    fn adopt(&self, lane: LaneShard, boundary: usize, live: Vec<Live>) -> Result<(), Failure> {
        for (stream, name, tensor) in live {
            if let Err(error) = self.carry.put(key(lane, stream, &name), tensor) {
                self.settle_at(lane, self.lanes.boundary(lane));
                return Err(failure::exec(error));
            }
        }
        self.settle_at(lane, Some(boundary));
        Ok(())
    }

    /// Before its range begins, a lane is the original model's: any earlier lane's copy will do.
    fn borrow_nearest(&self, lane: LaneShard, target: usize) -> Result<(), Failure> {
        let (range, shard) = lane;
        let Some(start) = self.plan.ranges.get(range.index()).map(|stages| stages.start.min(target)) else {
            return Ok(());
        };
        for other in (0..range.0).rev().map(RangeId) {
            let here = self.lanes.boundary(lane).unwrap_or(0);
            let Some((boundary, live)) = self.snapshot((other, shard)) else { continue };
            if boundary <= here || boundary > start {
                continue;
            }
            let names = self.program.carried(&self.plan, range, boundary);
            let original = live.into_iter().filter(|(stream, name, _)| {
                *stream == Stream::FullPrecision && names.contains(name.as_str())
            });
            let original: Vec<Live> = original.collect();
            if self.check_live(lane, boundary, &original).is_ok() {
                self.adopt(lane, boundary, original)?;
            }
        }
        Ok(())
    }

    /// The carry of a lane's shard as it is now; nothing if there is none, or it moves on while it is read.
    pub(crate) fn snapshot(&self, lane: LaneShard) -> Option<(usize, Vec<Live>)> {
        let boundary = self.lanes.boundary(lane)?;
        let keys = self.keys_at(lane, boundary).into_iter();
        let read = keys.map(|key| Some((key.stream, key.tensor.clone(), self.carry.get(&key).ok()?)));
        let live: Option<Vec<Live>> = read.collect();
        let live = live?;
        (self.lanes.boundary(lane) == Some(boundary)).then_some((boundary, live))
    }

    /// One segment on the streams the lane has there.
    fn run_segment(&self, lane: LaneShard, id: SegmentId) -> Result<(), Failure> {
        let segment = self.program.segment(id.index())?;
        if id.0 == 0 {
            self.load_inputs(lane)?;
        }
        if segment.nodes.is_empty() || segment.outputs.is_empty() {
            return Ok(());
        }
        let apart = self.plan.range_of(id) == lane.0 && self.program.parts(&self.plan, id, segment);
        if apart && lane.1.0 % 2 == 1 {
            // The first shards load both sessions side by side.
            self.session(id, segment, Stream::Quantized)?;
        }
        // The original first: the other stream takes over what is shared.
        self.run(id, segment, lane, Stream::FullPrecision)?;
        if apart {
            self.run(id, segment, lane, Stream::Quantized)?;
        }
        Ok(())
    }

    /// Graph inputs that any segment reads or any layer takes directly.
    fn load_inputs(&self, lane: LaneShard) -> Result<(), Failure> {
        for input in self.source().inputs(lane.1).map_err(failure::source)? {
            let tensor = Arc::new(transit::tensor(&input)?);
            self.carry.put(key(lane, Stream::FullPrecision, &input.name), tensor).map_err(failure::exec)?;
        }
        Ok(())
    }

    fn run(&self, id: SegmentId, segment: &Segment, lane: LaneShard, stream: Stream) -> Result<(), Failure> {
        let session = self.session(id, segment, stream)?;
        let takes_over = |name: &&String| stream == Stream::Quantized && segment.shared.contains(name);
        let given = segment.inputs.iter().chain(segment.shared.iter().filter(takes_over));
        let inputs: Result<Vec<_>, Failure> =
            given.map(|name| Ok((name.as_str(), self.carried(lane, stream, name)?))).collect();
        let inputs = inputs?;
        let views: Vec<(&str, &Carried)> = inputs.iter().map(|(name, carried)| (*name, carried)).collect();
        let made = segment.outputs.iter().filter(|name| !takes_over(name));
        let names: Vec<&str> = made.map(String::as_str).collect();
        let outputs = session.run_carried(&views, &names, self.program.carries()).map_err(failure::exec)?;
        for (name, carried) in names.iter().zip(outputs) {
            self.carry.put_carried(key(lane, stream, name), carried).map_err(failure::exec)?;
        }
        Ok(())
    }

    /// The tensor of a stream; where the quantized one does not differ there is only the original.
    pub(crate) fn carried(&self, lane: LaneShard, stream: Stream, name: &str) -> Result<Carried, Failure> {
        let stream = match self.program.is_parted(lane.0, name) {
            true => stream,
            false => Stream::FullPrecision,
        };
        self.carry.carried(&key(lane, stream, name)).map_err(failure::exec)
    }

    /// Brings the next segment's original weights to the devices while this stage's layers are solved, once. They do not depend on
    /// what is decided; where it fails, whoever runs the segment hears of it.
    pub(crate) fn load_ahead(self: &Arc<Self>, stage: SegmentId) {
        let next = SegmentId(stage.0 + 1);
        // What follows the last stage, the head among it, is never run.
        if next.index() >= self.plan.stages.len() {
            return;
        }
        let (Ok(segment), Some(_)) = (self.program.segment(next.index()), self.devices.first_cuda()) else {
            return;
        };
        let runs = !segment.nodes.is_empty() && !segment.outputs.is_empty();
        let here = self.plan.range_of(next) == self.plan.range_of(stage);
        if !(runs && here && lock(&self.ahead).insert(next)) {
            return;
        }
        let job = Arc::clone(self);
        let load = move || {
            let segment = job.program.segment(next.index())?;
            job.session(next, segment, Stream::FullPrecision).map(drop)
        };
        let named = std::thread::Builder::new().name("load ahead".into());
        let spawned = named.spawn(move || {
            if let Err(failure) = load() {
                tracing::debug!(segment = %next, %failure, "not loaded ahead");
            }
        });
        if let Err(error) = spawned {
            tracing::debug!(%error, "no thread to load ahead");
        }
    }

    fn session(&self, id: SegmentId, segment: &Segment, stream: Stream) -> Result<Arc<dyn Session>, Failure> {
        self.sessions.get((id, stream), || {
            let replace = match stream {
                Stream::Quantized => self.rounded_weights(id, segment)?,
                Stream::FullPrecision => BTreeMap::new(),
            };
            let (engine, devices) = (self.engine.as_ref(), self.devices.as_ref());
            self.program.load(engine, devices, segment, self.source().as_ref(), replace)
        })
    }

    /// On-grid weights of the layers that run in this segment and are decided. Layers given up keep their weights.
    fn rounded_weights(&self, id: SegmentId, segment: &Segment) -> Result<BTreeMap<String, Tensor>, Failure> {
        let mut replace = BTreeMap::new();
        for index in &segment.layers_inside {
            let layer_id = LayerId(*index as u32);
            if !self.plan.is_decided_in(layer_id, id) {
                continue;
            }
            let layer = self.program.layer(layer_id);
            if let Some(matrix) = self.dequantized(layer_id)? {
                let values = layer
                    .layout
                    .from_matrix(&layer.weight_shape, &matrix)
                    .map_err(|e| failure::internal(format!("layer `{}`: {e}", layer.name)))?;
                let tensor = Tensor::f32(layer.weight_shape.clone(), values).map_err(failure::model)?;
                replace.insert(layer.weight.clone(), tensor);
            }
        }
        Ok(replace)
    }

    /// The on-grid weights of a layer, `[rows, cols]`; `None` if it was given up. The node's threads wait for them: as many
    /// take part.
    fn dequantized(&self, id: LayerId) -> Result<Option<Vec<f32>>, Failure> {
        let layer = self.program.layer(id);
        let mut matrix = vec![0.0; layer.rows * layer.cols];
        let mut parts = Vec::new();
        let mut rest = matrix.as_mut_slice();
        for (chunk, rows) in self.plan.chunk_ids(id).zip(&self.entry(id)?.chunks) {
            let (part, behind) = rest.split_at_mut_checked(rows.len() * layer.cols).ok_or_else(|| {
                failure::internal(format!("layer `{}`: chunks of more rows than {}", layer.name, layer.rows))
            })?;
            parts.push((chunk, part));
            rest = behind;
        }
        let threads = self.threads.min(parts.len());
        let queue = Mutex::new(parts.into_iter());
        let work = || -> Result<bool, Failure> {
            loop {
                let Some((chunk, part)) = lock(&queue).next() else { return Ok(true) };
                if !self.dequantize_chunk(id, chunk, part)? {
                    return Ok(false);
                }
            }
        };
        let ended: Vec<Result<bool, Failure>> = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mine = work();
            let stopped = |_| Err(failure::internal("a thread that dequantizes stopped early".to_owned()));
            let others = others.into_iter().map(|other| other.join().unwrap_or_else(stopped));
            std::iter::once(mine).chain(others).collect()
        });
        let whole = ended.into_iter().try_fold(true, |all, one| one.map(|one| all && one))?;
        Ok(whole.then_some(matrix))
    }

    /// False if the layer was given up.
    fn dequantize_chunk(&self, id: LayerId, chunk: ChunkId, out: &mut [f32]) -> Result<bool, Failure> {
        let Some(rounding) = self.source().rounding(id, chunk).map_err(failure::source)? else {
            return Ok(false);
        };
        let name = &self.program.layer(id).name;
        let rows = rounding.encodings.dequantize(&rounding.q).map_err(|e| failure::quant(name, &e))?;
        if rows.len() != out.len() {
            let (found, expected) = (rows.len(), out.len());
            return Err(failure::internal(format!(
                "layer `{name}`, {chunk}: {found} weights, expected {expected}"
            )));
        }
        out.copy_from_slice(&rows);
        Ok(true)
    }

    fn peak(
        &self,
        lane: LaneShard,
        layer: usize,
        use_index: usize,
        tensor: &str,
    ) -> Result<PeakRecord, Failure> {
        let fp = self.carried(lane, Stream::FullPrecision, tensor)?;
        let q = self.carried(lane, Stream::Quantized, tensor)?;
        let described: &Layer = &self.program.layers[layer];
        let Layer { unfold, cols, groups, .. } = described;
        let unfolder = Unfolder::for_dims(tensor, unfold, fp.dims(), *cols, *groups);
        let positions = unfolder.map_err(failure::exec)?.positions();
        let used = sampled_positions(positions, self.plan.solver.positions_fraction, lane.1.0).len();
        Ok(PeakRecord {
            layer: LayerId(layer as u32),
            use_index: use_index as u32,
            full_precision: fp.peak(),
            quantized: q.peak(),
            positions: used as u64,
        })
    }
}
