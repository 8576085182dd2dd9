//! A node in this process: tasks in, results out, from as many threads as it has slots.
//!
//! Not here: the work itself (`job` and what it names), the connection to a coordinator (`daemon`).

use crate::attempt::Attempt;
use crate::devices::Devices;
use crate::exchange::Exchange;
use crate::failure;
use crate::job::{Job, lock};
use crate::rates::probe_flops;
use bytes::Bytes;
use halfstep_exec::{CarryStore, CarryUse, Engine};
use halfstep_work::{
    Cost, Done, Failure, Grant, Holding, Inventory, LeaseId, Node, NodeDescription, Plan, SegmentId, Source,
    Verdict, Wanted, Watch,
};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

/// What a node may use.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Tasks at once; 1 or more.
    pub threads: usize,
    /// Bytes of carries in memory; more goes to files. Products on their way into sums may take as much again; whoever makes more waits.
    pub memory_budget: usize,
    /// Where those files go.
    pub spill_dir: PathBuf,
}

/// See the module.
pub struct LocalNode {
    engine: Arc<dyn Engine>,
    options: NodeOptions,
    devices: Arc<Devices>,
    exchange: Option<Exchange>,
    flops_per_second: f64,
    job: RwLock<Option<Arc<Job>>>,
}

impl LocalNode {
    /// Bytes that carries may take in memory.
    pub(crate) fn memory_budget(&self) -> usize {
        self.options.memory_budget
    }

    /// A node that has no job yet. Times a product, for a few hundredths of a second once per process.
    pub fn new(engine: Box<dyn Engine>, options: NodeOptions) -> Self {
        let flops_per_second = probe_flops();
        let devices = Arc::new(Devices::cpu());
        let (exchange, job) = (None, RwLock::new(None));
        Self { engine: Arc::from(engine), options, devices, exchange, flops_per_second, job }
    }

    /// The same node, solving on these devices instead of the CPU.
    #[must_use]
    pub fn solving_on(self, devices: Devices) -> Self {
        Self { devices: Arc::new(devices), ..self }
    }

    /// The same node, adding up statistics in groups of nodes.
    #[must_use]
    pub fn exchanging_by(self, exchange: Exchange) -> Self {
        Self { exchange: Some(exchange), ..self }
    }

    /// What it adds up statistics with, if it does.
    pub fn exchange(&self) -> Option<&Exchange> {
        self.exchange.as_ref()
    }

    /// The job that is open, for rounds of it alone.
    pub(crate) fn open_job(&self) -> Option<Arc<Job>> {
        self.job().ok()
    }

    /// What it solves on.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Carries in memory and in files.
    pub fn carry_use(&self) -> CarryUse {
        self.job().map(|job| job.carry.usage()).unwrap_or_default()
    }

    /// Forgets the sums of a stage: it is over, which a node cannot always know by itself, or they do not count.
    pub fn drop_sums(&self, stage: SegmentId) {
        if let Ok(job) = self.job() {
            lock(&job.sums).drop_stages(|other| other == stage);
        }
    }

    /// Fetches a carry from a node that leaves, and keeps it. Blocks.
    ///
    /// # Errors
    /// `PeerLost` or `Damaged` if it cannot be had, `Internal` for what is no carry of the open job.
    pub fn take_over(&self, holder: &Holding) -> Result<(), Failure> {
        self.job()?.take_over(holder)
    }

    fn job(&self) -> Result<Arc<Job>, Failure> {
        let job = self.job.read().unwrap_or_else(PoisonError::into_inner);
        job.clone().ok_or_else(|| failure::peer("node: no job is open"))
    }
}

impl Node for LocalNode {
    fn describe(&self) -> NodeDescription {
        NodeDescription {
            name: "local".into(),
            slots: self.options.threads.max(1),
            device: self.devices.describe(),
            engine: self.engine.name(),
            flops_per_second: self.flops_per_second,
            memory_bytes: self.options.memory_budget as u64,
            exchange: self.exchange.as_ref().map(Exchange::describe).unwrap_or_default(),
        }
    }

    /// The same plan again keeps what is held; whoever opens another job of an equal plan must `close` first.
    fn open(&self, plan: Arc<Plan>, source: Arc<dyn Source>) -> Result<(), Failure> {
        if let Ok(job) = self.job()
            && job.plan == plan
        {
            job.reopen(source);
            return Ok(());
        }
        plan.validate().map_err(failure::internal)?;
        let NodeOptions { memory_budget, spill_dir, threads, .. } = &self.options;
        let carry = |precision| CarryStore::with_precision(*memory_budget, spill_dir, precision);
        let (engine, devices) = (Arc::clone(&self.engine), (Arc::clone(&self.devices), *threads));
        let job = Job::new(plan, source, engine, devices, carry, *memory_budget)?;
        *self.job.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(job));
        Ok(())
    }

    fn execute(&self, grant: &Grant, watch: &dyn Watch) -> Result<(Done, Cost), Failure> {
        let begun = Instant::now();
        let attempt = Attempt::new(grant, watch);
        let (done, refine_seconds) = self.job()?.execute(&attempt)?;
        let seconds = begun.elapsed().as_secs_f64();
        Ok((done, Cost { seconds, refine_seconds, bytes_fetched: attempt.bytes_fetched() }))
    }

    fn settle(&self, lease: LeaseId, verdict: Verdict) {
        if let Ok(job) = self.job() {
            job.settle(lease, verdict);
        }
    }

    fn serve(&self, wanted: &Wanted) -> Result<Bytes, Failure> {
        self.job()?.serve(wanted)
    }

    fn inventory(&self) -> Inventory {
        self.job().map(|job| job.inventory()).unwrap_or_default()
    }

    fn fence(&self) {
        if let Ok(job) = self.job() {
            job.fence();
        }
    }

    fn close(&self) {
        *self.job.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.devices.release();
    }
}
