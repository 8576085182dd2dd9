//! An open job on this node: the plan, the model's reading, and everything that is held for it.
//!
//! Not here: moving carries (`replay`), sums (`sums`), means and problems (`means`), other nodes' questions (`serve`).

use crate::devices::Devices;
use crate::exchange::Together;
use crate::layer_problem::{Gathered, LayerProblem};
use crate::lazy::Lazy;
use crate::means::HeldMeans;
use crate::program::Program;
use crate::replay::{LaneShard, Lanes};
use crate::room::ProductRooms;
use crate::sessions::Sessions;
use crate::sums::Sums;
use crate::{attempt::Attempt, failure};
use halfstep_exec::{CarryStore, Engine, SliceForm};
use halfstep_model::decoder::CarryPrecision;
use halfstep_work::{
    Done, Failure, FailureClass, LayerId, LayerPlan, PeakRecord, Plan, Propagation, SegmentId, ShardId,
    SliceId, Source, Task,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

/// Stages of a range that may be open at once where they do not wait for each other; the scheduler opens fewer.
const STAGES_AHEAD: usize = 4;

/// See the module. Locks below are never held together but in the order of the fields; `summed` comes before `sums`.
pub(crate) struct Job {
    pub(crate) plan: Arc<Plan>,
    /// Replaced when the job is opened again, over a new connection.
    source: RwLock<Arc<dyn Source>>,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) devices: Arc<Devices>,
    /// Of the node.
    pub(crate) threads: usize,
    pub(crate) program: Program,
    pub(crate) carry: CarryStore,
    pub(crate) lanes: Lanes,
    pub(crate) sessions: Sessions,
    /// The latest peaks of every shard in every range.
    pub(crate) captured: Mutex<BTreeMap<LaneShard, Captured>>,
    pub(crate) sums: Mutex<Sums>,
    /// Whoever reads sums at length shares it; who changes them has it alone.
    pub(crate) summed: RwLock<()>,
    /// Of products that are not in the sums yet.
    pub(crate) rooms: ProductRooms,
    /// Segments whose original is being loaded ahead, or was.
    pub(crate) ahead: Mutex<BTreeSet<SegmentId>>,
    /// Told of every verdict.
    pub(crate) settled: Condvar,
    pub(crate) means: Mutex<BTreeMap<LayerId, Arc<Mutex<HeldMeans>>>>,
    /// Means that a group made.
    pub(crate) together: Together,
    pub(crate) gathered: Mutex<HashMap<LayerId, Arc<Lazy<Gathered>>>>,
    pub(crate) problems: Mutex<HashMap<LayerId, Arc<Lazy<LayerProblem>>>>,
}

/// Peaks of one shard at the end of a segment.
type Captured = (SegmentId, Vec<PeakRecord>);

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every holder leaves what it guards whole at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job {
    pub(crate) fn new(
        plan: Arc<Plan>,
        source: Arc<dyn Source>,
        engine: Arc<dyn Engine>,
        (devices, threads): (Arc<Devices>, usize),
        carry: impl FnOnce(CarryPrecision) -> CarryStore,
        memory_budget: usize,
    ) -> Result<Self, Failure> {
        let program = Program::new(&plan, source.as_ref())?;
        program.check(engine.as_ref())?;
        if let Some(why) = program.left_to_cpu(&devices) {
            tracing::info!("{why}");
        }
        devices.let_stay(true);
        Ok(Self {
            plan,
            source: RwLock::new(source),
            engine,
            rooms: devices.product_rooms(memory_budget),
            devices,
            threads,
            carry: carry(program.carries()),
            program,
            lanes: Lanes::default(),
            sessions: Sessions::default(),
            ahead: Mutex::default(),
            captured: Mutex::default(),
            sums: Mutex::default(),
            summed: RwLock::default(),
            settled: Condvar::new(),
            means: Mutex::default(),
            together: Together::default(),
            gathered: Mutex::default(),
            problems: Mutex::default(),
        })
    }

    pub(crate) fn source(&self) -> Arc<dyn Source> {
        Arc::clone(&self.source.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn reopen(&self, source: Arc<dyn Source>) {
        *self.source.write().unwrap_or_else(PoisonError::into_inner) = source;
    }

    /// Works one task off; also the seconds spent refining.
    pub(crate) fn execute(self: &Arc<Self>, attempt: &Attempt<'_>) -> Result<(Done, f64), Failure> {
        if let Task::Solve { layer, .. } = &attempt.grant.lease.task {
            self.load_ahead(self.entry(*layer)?.stage);
        }
        let done = self.work_off(attempt);
        if done.as_ref().is_err_and(|failure| failure.class == FailureClass::OutOfMemory) {
            self.clear_devices();
        }
        done
    }

    /// Activations that stay on devices, and models that were loaded ahead, make room for what has to be there.
    fn clear_devices(&self) {
        self.devices.let_stay(false);
        tracing::info!("a device is short of memory: activations that stayed there leave it");
        self.sessions.clear();
        if let Err(error) = self.carry.leave_devices() {
            tracing::warn!(%error, "activations stay on a device that is short of memory");
        }
    }

    fn work_off(&self, attempt: &Attempt<'_>) -> Result<(Done, f64), Failure> {
        attempt.step()?;
        let plain = |done: Result<Done, Failure>| done.map(|done| (done, 0.0));
        match &attempt.grant.lease.task {
            Task::Forward { range, shard } => plain(self.forward(attempt, *range, *shard)),
            Task::Capture { segment, shard } => {
                self.pass(*segment);
                plain(self.capture(attempt, *segment, *shard))
            }
            Task::Accumulate { segment, shard, peaks } => {
                self.pass(*segment);
                plain(self.accumulate(attempt, *segment, *shard, peaks))
            }
            Task::Reduce { layer, slice } => {
                self.pass(self.entry(*layer)?.stage);
                plain(self.reduce(attempt, *layer, *slice))
            }
            Task::Solve { layer, chunk } => {
                self.pass(self.entry(*layer)?.stage);
                self.solve(attempt, *layer, *chunk)
            }
        }
    }

    /// A stage begins: in sequential propagation all before it in its range are solved, otherwise all but a few. Their
    /// statistics can go.
    fn pass(&self, stage: SegmentId) {
        let ahead = match self.plan.propagation {
            Propagation::Sequential => 1,
            Propagation::Independent => STAGES_AHEAD,
        };
        let range = self.plan.range_of(stage);
        self.drop_stages(|other| {
            other.index() + ahead <= stage.index() && self.plan.range_of(other) == range
        });
    }

    /// Drops sums, means and problems of stages.
    pub(crate) fn drop_stages(&self, passed: impl Fn(SegmentId) -> bool) {
        let stage_of = |layer: &LayerId| self.plan.layer(*layer).stage;
        lock(&self.sums).drop_stages(&passed);
        lock(&self.means).retain(|layer, _| !passed(stage_of(layer)));
        self.together.forget(|layer| passed(stage_of(&layer)));
        lock(&self.gathered).retain(|layer, _| !passed(stage_of(layer)));
        lock(&self.problems).retain(|layer, _| !passed(stage_of(layer)));
    }

    /// The plan's entry; ids may come from a network.
    pub(crate) fn entry(&self, id: LayerId) -> Result<&LayerPlan, Failure> {
        self.plan.layers.get(id.index()).ok_or_else(|| failure::internal(format!("{id}: not in the plan")))
    }

    pub(crate) fn check_shard(&self, shard: ShardId) -> Result<(), Failure> {
        match shard.index() < self.plan.shards.len() {
            true => Ok(()),
            false => {
                Err(failure::internal(format!("{shard}: the plan has {} shards", self.plan.shards.len())))
            }
        }
    }

    /// Rows of a slice.
    pub(crate) fn rows(&self, layer: LayerId, slice: SliceId) -> Result<Range<usize>, Failure> {
        let rows = self.entry(layer)?.slices.get(slice.index()).cloned();
        rows.ok_or_else(|| failure::internal(format!("{layer} {slice}: not in the plan")))
    }

    /// What statistics of a layer look like, on every node.
    pub(crate) fn form(&self, id: LayerId) -> SliceForm {
        let layer = self.program.layer(id);
        SliceForm {
            cols: layer.cols,
            groups: layer.groups,
            uses: layer.uses.len(),
            differs: self.program.differs(&self.plan, id),
        }
    }
}
