//! A node in this process: tasks in, results out, from as many threads as it has slots.

use crate::layer_problem::LayerProblem;
use crate::program::Program;
use crate::{failure, transit};
use halfstep_compute::{Cpu, Device};
use halfstep_exec::{
    Agreement, CarryKey, CarryStore, CarryUse, Engine, LayerStatistics, Sampling, Session, Stream, Unfolder,
    means, peak, sampled_positions,
};
use halfstep_model::{Layer, Segment, Tensor};
use halfstep_solver::Workspace;
use halfstep_work::{
    ChunkId, Done, Failure, LayerId, Lease, Node, NodeDescription, Objective, PeakRecord, Plan, Propagation,
    SegmentId, ShardId, Source, Task,
};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};

/// What a node may use.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Tasks at once; 1 or more.
    pub threads: usize,
    /// Bytes of carries in memory; more goes to files.
    pub memory_budget: usize,
    /// Where those files go.
    pub spill_dir: PathBuf,
}

/// See the module.
pub struct LocalNode {
    engine: Box<dyn Engine>,
    options: NodeOptions,
    job: RwLock<Option<Arc<Job>>>,
}

struct Job {
    plan: Arc<Plan>,
    source: Arc<dyn Source>,
    program: Program,
    carry: CarryStore,
    sessions: Mutex<Sessions>,
    statistics: Mutex<HashMap<(LayerId, u32), Arc<LayerStatistics>>>,
    problems: Mutex<HashMap<LayerId, (Arc<LayerProblem>, usize)>>,
    workspaces: Mutex<Vec<Workspace<<Cpu as Device>::Buffer>>>,
}

/// The sessions of one segment; the ones of the segment before are dropped, so memory follows the segment.
#[derive(Default)]
struct Sessions {
    segment: Option<SegmentId>,
    original: Arc<OnceLock<Result<Arc<dyn Session>, Failure>>>,
    quantized: Arc<OnceLock<Result<Arc<dyn Session>, Failure>>>,
}

impl LocalNode {
    /// A node that has no job yet.
    pub fn new(engine: Box<dyn Engine>, options: NodeOptions) -> Self {
        Self { engine, options, job: RwLock::new(None) }
    }

    /// Carries in memory and in files.
    pub fn carry_use(&self) -> CarryUse {
        self.job().map(|job| job.carry.usage()).unwrap_or_default()
    }

    fn job(&self) -> Result<Arc<Job>, Failure> {
        let job = self.job.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        job.clone().ok_or_else(|| failure::internal("node: no job is open"))
    }
}

impl Node for LocalNode {
    fn describe(&self) -> NodeDescription {
        NodeDescription {
            name: "local".into(),
            slots: self.options.threads.max(1),
            device: Cpu.describe(),
            engine: self.engine.name(),
        }
    }

    fn open(&self, plan: Arc<Plan>, source: Arc<dyn Source>) -> Result<(), Failure> {
        let program = Program::new(&plan, source.as_ref())?;
        let job = Job {
            program,
            carry: CarryStore::new(self.options.memory_budget, &self.options.spill_dir),
            sessions: Mutex::default(),
            statistics: Mutex::default(),
            problems: Mutex::default(),
            workspaces: Mutex::default(),
            plan,
            source,
        };
        *self.job.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Arc::new(job));
        Ok(())
    }

    fn execute(&self, lease: &Lease) -> Result<Done, Failure> {
        let job = self.job()?;
        match &lease.task {
            Task::Capture { segment, shard } => job.capture(self.engine.as_ref(), *segment, *shard),
            Task::Accumulate { segment, shard, peaks } => job.accumulate(*segment, *shard, peaks),
            Task::Reduce { layer } => job.reduce(*layer),
            Task::Solve { layer, chunk } => job.solve(*layer, *chunk),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn key(stream: Stream, tensor: &str, shard: ShardId) -> CarryKey {
    CarryKey { stream, tensor: tensor.into(), shard: shard.0 }
}

impl Job {
    fn capture(&self, engine: &dyn Engine, id: SegmentId, shard: ShardId) -> Result<Done, Failure> {
        let segment = self.program.segment(id.index())?;
        if id.0 == 0 {
            self.load_inputs(shard)?;
        }
        if !segment.nodes.is_empty() && !segment.outputs.is_empty() {
            // Until a rounded layer has run, both streams are one.
            let differs = self.plan.propagation == Propagation::Sequential
                && (segment.layers_inside.iter().any(|l| self.is_decided(*l))
                    || segment.inputs.iter().any(|t| self.carry.contains(&key(Stream::Quantized, t, shard))));
            if differs {
                self.run(engine, id, segment, shard, Stream::Quantized)?;
            }
            self.run(engine, id, segment, shard, Stream::FullPrecision)?;
        }
        let peaks: Result<Vec<_>, _> =
            segment.taps.iter().map(|tap| self.peak(tap.layer, tap.use_index, &tap.tensor, shard)).collect();
        self.carry.retain(shard.0, |k| {
            segment.live_after.contains(&k.tensor) || segment.taps.iter().any(|tap| tap.tensor == k.tensor)
        });
        Ok(Done::Captured { peaks: peaks? })
    }

    /// Graph inputs that any segment reads or any layer takes directly.
    fn load_inputs(&self, shard: ShardId) -> Result<(), Failure> {
        for input in self.source.inputs(shard).map_err(failure::source)? {
            let tensor = Arc::new(transit::tensor(&input)?);
            self.carry.put(key(Stream::FullPrecision, &input.name, shard), tensor).map_err(failure::exec)?;
        }
        Ok(())
    }

    /// A layer is rounded in the quantized stream once its last use's stage is behind, unless it was given up.
    fn is_decided(&self, layer: usize) -> bool {
        self.source.rounding(LayerId(layer as u32), ChunkId(0)).is_ok_and(|r| r.is_some())
    }

    /// The tensor of a stream; where the quantized one does not differ there is only the original.
    fn carried(&self, stream: Stream, tensor: &str, shard: ShardId) -> Result<Arc<Tensor>, Failure> {
        if stream == Stream::Quantized {
            let quantized = key(stream, tensor, shard);
            if self.carry.contains(&quantized) {
                return self.carry.get(&quantized).map_err(failure::exec);
            }
        }
        self.carry.get(&key(Stream::FullPrecision, tensor, shard)).map_err(failure::exec)
    }

    fn run(
        &self,
        engine: &dyn Engine,
        id: SegmentId,
        segment: &Segment,
        shard: ShardId,
        stream: Stream,
    ) -> Result<(), Failure> {
        let session = self.session(engine, id, segment, stream)?;
        let inputs: Result<Vec<_>, Failure> = segment
            .inputs
            .iter()
            .map(|name| Ok((name.as_str(), self.carried(stream, name, shard)?)))
            .collect();
        let inputs = inputs?;
        let views: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, t)| (*name, t.as_ref())).collect();
        let names: Vec<&str> = segment.outputs.iter().map(String::as_str).collect();
        let outputs = session.run(&views, &names).map_err(failure::exec)?;
        for (name, tensor) in names.iter().zip(outputs) {
            self.carry.put(key(stream, name, shard), Arc::new(tensor)).map_err(failure::exec)?;
        }
        Ok(())
    }

    fn session(
        &self,
        engine: &dyn Engine,
        id: SegmentId,
        segment: &Segment,
        stream: Stream,
    ) -> Result<Arc<dyn Session>, Failure> {
        let slot = {
            let mut sessions = lock(&self.sessions);
            if sessions.segment != Some(id) {
                *sessions = Sessions { segment: Some(id), ..Sessions::default() };
            }
            Arc::clone(if stream == Stream::Quantized { &sessions.quantized } else { &sessions.original })
        };
        slot.get_or_init(|| {
            let replace =
                if stream == Stream::Quantized { self.rounded_weights(segment)? } else { BTreeMap::new() };
            let model = self.program.sub_model(segment, self.source.as_ref(), replace)?;
            engine.load(model).map(Arc::from).map_err(failure::exec)
        })
        .clone()
    }

    /// On-grid weights of the layers that run in this segment and are decided.
    fn rounded_weights(&self, segment: &Segment) -> Result<BTreeMap<String, Tensor>, Failure> {
        let mut replace = BTreeMap::new();
        for index in segment.layers_inside.iter().filter(|l| self.is_decided(**l)) {
            let id = LayerId(*index as u32);
            let layer = self.program.layer(id);
            if let Some(matrix) = self.dequantized(id)? {
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

    fn dequantized(&self, id: LayerId) -> Result<Option<Vec<f32>>, Failure> {
        let mut matrix = Vec::new();
        for chunk in self.plan.chunk_ids(id) {
            let Some(rounding) = self.source.rounding(id, chunk).map_err(failure::source)? else {
                return Ok(None);
            };
            let rows = rounding.encodings.dequantize(&rounding.q);
            matrix.extend(rows.map_err(|e| failure::quant(&self.program.layer(id).name, &e))?);
        }
        Ok(Some(matrix))
    }

    fn peak(
        &self,
        layer: usize,
        use_index: usize,
        tensor: &str,
        shard: ShardId,
    ) -> Result<PeakRecord, Failure> {
        let fp = self.carried(Stream::FullPrecision, tensor, shard)?;
        let q = self.carried(Stream::Quantized, tensor, shard)?;
        let described: &Layer = &self.program.layers[layer];
        let unfolder = Unfolder::new(tensor, &described.unfold, &fp, described.cols, described.groups);
        let positions = unfolder.map_err(failure::exec)?.positions();
        let used = sampled_positions(positions, self.plan.solver.positions_fraction, shard.0).len();
        let largest = |t: &Tensor| t.as_f32().map_or(f32::NAN, peak);
        Ok(PeakRecord {
            layer: LayerId(layer as u32),
            use_index: use_index as u32,
            full_precision: largest(&fp),
            quantized: largest(&q),
            positions: used as u64,
        })
    }

    fn accumulate(&self, id: SegmentId, shard: ShardId, peaks: &[PeakRecord]) -> Result<Done, Failure> {
        let segment = self.program.segment(id.index())?;
        for tap in &segment.taps {
            let layer = LayerId(tap.layer as u32);
            let agreed = peaks.iter().find(|p| p.layer == layer && p.use_index as usize == tap.use_index);
            let agreed = agreed.ok_or_else(|| failure::internal(format!("{layer}: no peaks were agreed")))?;
            if !(agreed.full_precision.is_finite() && agreed.quantized.is_finite()) {
                // The layer fails alone, in `reduce`, which finds no statistics.
                continue;
            }
            let fp = self.carried(Stream::FullPrecision, &tap.tensor, shard)?;
            let differs = self.carry.contains(&key(Stream::Quantized, &tap.tensor, shard));
            let q = differs.then(|| self.carried(Stream::Quantized, &tap.tensor, shard)).transpose()?;
            let statistics = self.statistics_of(layer, agreed, !differs)?;
            statistics
                .accumulate(self.program.layer(layer), &tap.tensor, shard.0, &fp, q.as_deref())
                .map_err(failure::exec)?;
        }
        self.carry.retain(shard.0, |k| segment.live_after.contains(&k.tensor));
        Ok(Done::Accumulated)
    }

    fn statistics_of(
        &self,
        layer: LayerId,
        agreed: &PeakRecord,
        same_streams: bool,
    ) -> Result<Arc<LayerStatistics>, Failure> {
        let mut all = lock(&self.statistics);
        if let Some(known) = all.get(&(layer, agreed.use_index)) {
            return Ok(Arc::clone(known));
        }
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
        let described = self.program.layer(layer);
        let created = LayerStatistics::new(described, u64::from(layer.0), agreement, sampling, same_streams);
        let created = Arc::new(created.map_err(failure::exec)?);
        all.insert((layer, agreed.use_index), Arc::clone(&created));
        Ok(created)
    }

    fn reduce(&self, id: LayerId) -> Result<Done, Failure> {
        let layer = self.program.layer(id);
        let entry = self.plan.layer(id);
        let uses: Vec<Arc<LayerStatistics>> = {
            let mut all = lock(&self.statistics);
            (0..layer.uses.len() as u32).filter_map(|u| all.remove(&(id, u))).collect()
        };
        if uses.len() != layer.uses.len() {
            return Err(Failure::new(
                halfstep_work::FailureClass::NonFinite,
                format!("layer `{}`: its inputs are not finite on the calibration data", layer.name),
            ));
        }
        let positions = uses.iter().map(|u| u.positions()).sum();
        let groups = means(&uses);
        drop(uses);
        let problem = LayerProblem::new(entry, layer, self.source.as_ref(), groups, positions)?;
        lock(&self.problems).insert(id, (Arc::new(problem), entry.chunks.len()));
        Ok(Done::Reduced)
    }

    fn solve(&self, id: LayerId, chunk: ChunkId) -> Result<Done, Failure> {
        let entry = self.plan.layer(id);
        let rows = entry.chunks.get(chunk.index()).cloned();
        let rows = rows.ok_or_else(|| failure::internal(format!("{id} {chunk}: not in the plan")))?;
        let problem = lock(&self.problems).get(&id).map(|(problem, _)| Arc::clone(problem));
        let problem = problem.ok_or_else(|| failure::internal(format!("{id}: not reduced on this node")))?;
        let mut workspace = lock(&self.workspaces).pop().unwrap_or_default();
        let solved =
            problem.solve(id, chunk, rows, self.program.layer(id), &self.plan.solver, &mut workspace);
        lock(&self.workspaces).push(workspace);
        let rounding = solved?;
        self.forget_when_solved(id);
        Ok(Done::Solved(Arc::new(rounding)))
    }

    /// Statistics are large: they go as soon as the last chunk is decided.
    fn forget_when_solved(&self, id: LayerId) {
        let mut problems = lock(&self.problems);
        if let Some((_, left)) = problems.get_mut(&id) {
            *left -= 1;
            if *left == 0 {
                problems.remove(&id);
            }
        }
    }
}
