//! A fleet in one process: nodes that fetch from each other's `serve`, and a plain loop over the phases of each stage.
//!
//! Who does what is drawn from a seed: every task goes to any node, shards move, carries are offered or withheld, nodes
//! are dropped and replaced. Not here: a scheduler; the loop knows only what may follow what.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    reason = "each test file uses a part; a test may stop"
)]

pub mod coordinator;
pub mod driver;

use bytes::Bytes;
use halfstep_agent::{CountingEngine, Devices, LocalNode, NodeCounts, NodeOptions, RtenEngine};
use halfstep_model::onnx::tensor_shape_proto::{Dimension, dimension};
use halfstep_model::onnx::{
    AttributeProto, OperatorSetIdProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use halfstep_model::{
    Data, GraphProto, Model, ModelProto, NodeProto, Tensor, cut, list_layers, normalize, skeleton,
};
use halfstep_quant::{Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_work::*;
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;
use tempfile::TempDir;

/// Values without pattern, in -0.5..0.5, the same for the same salt.
pub fn noise(len: usize, salt: u64) -> Vec<f32> {
    let mut draw = Draw::new(salt);
    (0..len).map(|_| (draw.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5).collect()
}

/// A generator of choices (splitmix64).
pub struct Draw(u64);

impl Draw {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for i in (1..all.len()).rev() {
            all.swap(i, self.below(i + 1));
        }
    }
}

/// A graph under construction; opset 17.
#[derive(Default)]
pub struct Graph(GraphProto);

impl Graph {
    pub fn input(mut self, name: &str, dims: &[Option<i64>]) -> Self {
        let dim = |dim: &Option<i64>| Dimension {
            denotation: None,
            value: Some(
                dim.map_or_else(|| dimension::Value::DimParam("N".into()), dimension::Value::DimValue),
            ),
        };
        let shape = TensorShapeProto { dim: dims.iter().map(dim).collect() };
        let tensor = type_proto::Tensor { elem_type: Some(1), shape: Some(shape) };
        let r#type = TypeProto { denotation: None, value: Some(type_proto::Value::TensorType(tensor)) };
        self.0.input.push(ValueInfoProto {
            name: Some(name.into()),
            r#type: Some(r#type),
            ..Default::default()
        });
        self
    }

    pub fn output(mut self, name: &str) -> Self {
        self.0.output.push(ValueInfoProto { name: Some(name.into()), ..Default::default() });
        self
    }

    pub fn node(mut self, op: &str, inputs: &[&str], output: &str) -> Self {
        self.0.node.push(NodeProto {
            op_type: Some(op.into()),
            name: Some(format!("node_{output}")),
            input: inputs.iter().map(|i| (*i).into()).collect(),
            output: vec![output.into()],
            ..Default::default()
        });
        self
    }

    /// Gives the last node an attribute of integers.
    pub fn ints(mut self, name: &str, ints: &[i64]) -> Self {
        let attribute = AttributeProto {
            name: Some(name.into()),
            r#type: Some(7),
            ints: ints.to_vec(),
            ..Default::default()
        };
        self.0.node.last_mut().unwrap().attribute.push(attribute);
        self
    }

    /// Gives the last node an integer attribute.
    pub fn int(mut self, name: &str, value: i64) -> Self {
        let attribute =
            AttributeProto { name: Some(name.into()), r#type: Some(2), i: Some(value), ..Default::default() };
        self.0.node.last_mut().unwrap().attribute.push(attribute);
        self
    }

    pub fn weight(self, name: &str, shape: &[usize]) -> Self {
        let salt = name.bytes().map(u64::from).sum();
        self.constant(name, shape, noise(shape.iter().product(), salt))
    }

    pub fn constant(mut self, name: &str, shape: &[usize], values: Vec<f32>) -> Self {
        self.0.initializer.push(Tensor::new(shape.to_vec(), Data::F32(values)).unwrap().to_proto(name));
        self
    }

    pub fn bytes(self) -> Vec<u8> {
        let opset_import = vec![OperatorSetIdProto { domain: None, version: Some(17) }];
        let graph = GraphProto { name: Some("g".into()), ..self.0 };
        let proto =
            ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..Default::default() };
        proto.encode_to_vec()
    }

    pub fn model(self) -> Model {
        Model::from_bytes(self.bytes().into()).unwrap()
    }
}

/// Four dense layers in a row with activations between, and a residual connection: 5 stages.
pub fn small_model() -> Model {
    Graph::default()
        .input("x", &[None, Some(6)])
        .weight("w1", &[6, 5])
        .weight("w2", &[5, 4])
        .weight("w3", &[4, 5])
        .weight("w4", &[5, 3])
        .weight("w5", &[3, 2])
        .node("MatMul", &["x", "w1"], "a")
        .node("Relu", &["a"], "b")
        .node("MatMul", &["b", "w2"], "c")
        .node("Tanh", &["c"], "d")
        .node("MatMul", &["d", "w3"], "e")
        .node("Add", &["e", "b"], "f")
        .node("MatMul", &["f", "w4"], "g")
        .node("Relu", &["g"], "h")
        .node("MatMul", &["h", "w5"], "y")
        .output("y")
        .model()
}

/// Three layers on the input, one of them stored the other way round, and two on what they make, like a decoder's block.
pub fn branched_model() -> Model {
    Graph::default()
        .input("x", &[None, Some(6)])
        .weight("query", &[6, 8])
        .weight("key", &[6, 8])
        .weight("value", &[3, 6])
        .weight("gate", &[11, 9])
        .weight("up", &[11, 9])
        .weight("down", &[9, 2])
        .node("MatMul", &["x", "query"], "a")
        .node("MatMul", &["x", "key"], "b")
        .node("Gemm", &["x", "value"], "c")
        .int("transB", 1)
        .node("Mul", &["a", "b"], "d")
        .node("Concat", &["d", "c"], "e")
        .int("axis", 1)
        .node("MatMul", &["e", "gate"], "f")
        .node("MatMul", &["e", "up"], "g")
        .node("Sigmoid", &["f"], "h")
        .node("Mul", &["h", "g"], "i")
        .node("MatMul", &["i", "down"], "y")
        .output("y")
        .model()
}

/// The same convolution at two depths, a grouped one between, and a head: one use is before any rounded layer.
pub fn shared_model() -> Model {
    let pads = [1, 1, 1, 1];
    Graph::default()
        .input("x", &[None, Some(2), Some(5), Some(5)])
        .weight("w", &[2, 2, 3, 3])
        .weight("v", &[2, 1, 3, 3])
        .weight("head", &[2, 3])
        .node("Conv", &["x", "w"], "a")
        .ints("pads", &pads)
        .node("Relu", &["a"], "b")
        .node("Conv", &["b", "v"], "c")
        .ints("pads", &pads)
        .int("group", 2)
        .node("Conv", &["c", "w"], "d")
        .ints("pads", &pads)
        .node("GlobalAveragePool", &["d"], "e")
        .node("Flatten", &["e"], "f")
        .node("MatMul", &["f", "head"], "y")
        .output("y")
        .model()
}

pub fn fashion_mnist() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/fashion-mnist/model.onnx");
    let mut model = Model::read(&path).unwrap();
    normalize(&mut model);
    halfstep_model::fold_batch_norms(&mut model).unwrap();
    model
}

/// What a job of the tests varies.
#[derive(Clone)]
pub struct Settings {
    pub shards: usize,
    pub samples_per_shard: usize,
    pub sample: Vec<usize>,
    pub ranges: usize,
    pub objective: Objective,
    pub propagation: Propagation,
    pub iterations: u32,
    /// Whether layers that read the same rows share their statistics.
    pub shared: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            shards: 5,
            samples_per_shard: 3,
            sample: vec![6],
            ranges: 1,
            objective: Objective::Gram,
            propagation: Propagation::Sequential,
            iterations: 5,
            shared: true,
        }
    }
}

/// A model with its plan and samples.
pub struct Setup {
    pub model: Model,
    pub plan: Arc<Plan>,
    pub inputs: Vec<Vec<InputTensor>>,
}

fn tiles(len: usize, size: usize) -> Vec<Range<usize>> {
    (0..len).step_by(size).map(|start| start..len.min(start + size)).collect()
}

pub fn setup(model: Model, settings: &Settings) -> Setup {
    let (layers, _) = list_layers(&model).unwrap();
    let cut = cut(&model, &layers, &vec![true; layers.len()]).unwrap();
    let stages = cut.segments.len();
    let grid = GridSpec {
        bits: 3,
        scheme: Scheme::Symmetric,
        granularity: Granularity::PerChannel,
        range: RangeEstimator::Mse,
    };
    let entries = layers.iter().enumerate().map(|(index, layer)| {
        let per_group = layer.rows / layer.groups;
        let stage = cut.segments.iter().position(|s| s.decided.contains(&index)).unwrap();
        let chunks = (0..layer.groups).flat_map(|g| {
            tiles(per_group, 7).into_iter().map(move |r| g * per_group + r.start..g * per_group + r.end)
        });
        let lends = |other: &usize| settings.shared && layer.reads_rows_of(&layers[*other]);
        let statistics_of = (0..index).find(lends).filter(|_| settings.objective == Objective::Gram);
        let own = if statistics_of.is_none() { layer.cols * layer.groups } else { 0 };
        LayerPlan {
            id: LayerId(index as u32),
            name: layer.name.clone(),
            op_type: layer.op_type.clone(),
            rows: layer.rows,
            cols: layer.cols,
            groups: layer.groups,
            grid,
            chunks: chunks.collect(),
            statistics_of: statistics_of.map(|lender| LayerId(lender as u32)),
            slices: tiles(own, own.div_ceil(3).max(1)),
            stage: SegmentId(stage as u32),
        }
    });
    let solver = SolverSettings {
        objective: settings.objective,
        iterations: settings.iterations,
        learning_rate: 0.1,
        beta: (20.0, 2.0),
        warm_start: 0.2,
        lambda: 1.0,
        batch: 4,
        damping: 0.01,
        start: StartPoint::Nearest,
        refine_sweeps: 5,
        scale_fits: 0,
        seed: 0,
        positions_per_shard: 4,
        positions_fraction: 1.0,
    };
    let samples = settings.shards * settings.samples_per_shard;
    let plan = Plan {
        layers: entries.collect(),
        kept: Vec::new(),
        stages: (0..stages)
            .map(|s| StagePlan {
                solve: cut.segments[s].decided.iter().map(|l| LayerId(*l as u32)).collect(),
            })
            .collect(),
        shards: tiles(samples, settings.samples_per_shard),
        batch: settings.samples_per_shard,
        propagation: settings.propagation,
        solver,
        ranges: tiles(stages, stages.div_ceil(settings.ranges)),
    };
    plan.validate().unwrap();
    let name = model.inputs()[0].name.clone();
    let shape = [vec![settings.samples_per_shard], settings.sample.clone()].concat();
    let shard = |salt: usize| {
        let values = noise(shape.iter().product(), salt as u64 + 1);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        vec![InputTensor {
            name: name.clone(),
            kind: ScalarKind::F32,
            shape: shape.clone(),
            bytes: bytes.into(),
        }]
    };
    Setup { inputs: (0..settings.shards).map(shard).collect(), plan: Arc::new(plan), model }
}

impl Setup {
    pub fn constant(&self, name: &str) -> Result<InputTensor, SourceError> {
        let tensor = self.model.tensor(name).map_err(|e| SourceError::new(FailureClass::BadInput, e))?;
        let bytes = tensor.data.to_le_bytes().into();
        let kind = match tensor.data {
            Data::F32(_) => ScalarKind::F32,
            Data::I64(_) => ScalarKind::I64,
            other => panic!("no constant of a test has this type: {other:?}"),
        };
        Ok(InputTensor { name: name.into(), kind, shape: tensor.shape, bytes })
    }
}

/// What one undisturbed node makes of it.
pub fn alone(setup: Setup) -> Roundings {
    let found = Fleet::new(setup, 1, 0).run();
    assert!(!found.is_empty());
    found
}

pub type Roundings = BTreeMap<(LayerId, ChunkId), Arc<Rounding>>;

/// Where the fleet's nodes fetch from.
pub struct TestSource {
    setup: Arc<Setup>,
    pub roundings: Mutex<Roundings>,
    pub failed: Mutex<BTreeSet<LayerId>>,
    pub nodes: RwLock<BTreeMap<NodeId, Arc<LocalNode>>>,
    pub fetched: Mutex<BTreeMap<&'static str, usize>>,
}

impl Source for TestSource {
    fn program(&self) -> Result<Bytes, SourceError> {
        Ok(skeleton(&self.setup.model))
    }

    fn constant(&self, name: &str) -> Result<InputTensor, SourceError> {
        self.setup.constant(name)
    }

    fn inputs(&self, shard: ShardId) -> Result<Vec<InputTensor>, SourceError> {
        Ok(self.setup.inputs[shard.index()].clone())
    }

    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Option<Arc<Rounding>>, SourceError> {
        if self.failed.lock().unwrap().contains(&layer) {
            return Ok(None);
        }
        let found = self.roundings.lock().unwrap().get(&(layer, chunk)).cloned();
        found
            .map(Some)
            .ok_or_else(|| SourceError::new(FailureClass::Internal, format!("{layer}: not committed")))
    }

    fn held(&self, holder: &Holding, wanted: &Wanted) -> Result<Bytes, SourceError> {
        let node = self.nodes.read().unwrap().get(&holder.node).cloned();
        let node = node.ok_or_else(|| SourceError::new(FailureClass::PeerLost, "gone"))?;
        let kind = match wanted {
            Wanted::Carry { .. } => "carry",
            Wanted::SumsSlice { .. } => "sums",
            Wanted::MeansSlice { .. } => "means",
            Wanted::Samples { .. } => "samples",
        };
        self.everybody_answers(wanted);
        let bytes = node.serve(wanted).map_err(|f| SourceError::new(f.class, f.message))?;
        *self.fetched.lock().unwrap().entry(kind).or_default() += 1;
        Ok(bytes)
    }
}

impl TestSource {
    /// The node that asks may be asked for the same at the same time: it keeps no lock that answering needs.
    fn everybody_answers(&self, wanted: &Wanted) {
        let nodes: Vec<_> = self.nodes.read().unwrap().values().cloned().collect();
        for node in nodes {
            let (told, answered) = std::sync::mpsc::channel();
            let wanted = wanted.clone();
            std::thread::spawn(move || {
                // Whether it has it is of no account here.
                let _ = node.serve(&wanted);
                told.send(())
            });
            answered.recv_timeout(Duration::from_secs(20)).expect("a node that asks others answers them");
        }
    }
}

/// Nodes and what the loop knows of them.
pub struct Fleet {
    pub setup: Arc<Setup>,
    pub source: Arc<TestSource>,
    pub draw: Draw,
    pub counts: Vec<NodeCounts>,
    /// Once in how many tasks a node is dropped; 0 for never.
    pub drop_once_in: usize,
    /// Once in how many tasks no carry is offered; 0 for never.
    pub withhold_once_in: usize,
    pub memory_budget: usize,
    /// Opened by every node for itself.
    devices: fn() -> Devices,
    peaks: BTreeMap<(SegmentId, ShardId), Vec<PeakRecord>>,
    /// Whose sums have a shard of a stage.
    owners: BTreeMap<(SegmentId, ShardId), NodeId>,
    means: BTreeMap<(LayerId, SliceId), NodeId>,
    next_lease: u64,
    next_node: u32,
    spill: TempDir,
}

impl Fleet {
    pub fn new(setup: Setup, nodes: usize, seed: u64) -> Self {
        Self::on(Devices::cpu, setup, nodes, seed)
    }

    pub fn on(devices: fn() -> Devices, setup: Setup, nodes: usize, seed: u64) -> Self {
        let setup = Arc::new(setup);
        let source = Arc::new(TestSource {
            setup: Arc::clone(&setup),
            roundings: Mutex::default(),
            failed: Mutex::default(),
            nodes: RwLock::default(),
            fetched: Mutex::default(),
        });
        let mut fleet = Self {
            setup,
            source,
            draw: Draw::new(seed),
            counts: Vec::new(),
            drop_once_in: 0,
            withhold_once_in: 0,
            memory_budget: 1 << 20,
            devices,
            peaks: BTreeMap::new(),
            owners: BTreeMap::new(),
            means: BTreeMap::new(),
            next_lease: 1 << 32,
            next_node: 0,
            spill: TempDir::new().unwrap(),
        };
        (0..nodes).for_each(|_| fleet.join());
        fleet
    }

    pub fn join(&mut self) {
        let (engine, counts) = CountingEngine::new(RtenEngine::default());
        let spill_dir = self.spill.path().to_path_buf();
        let options = NodeOptions { threads: 1, memory_budget: self.memory_budget, spill_dir };
        let node = LocalNode::new(Box::new(engine), options).solving_on((self.devices)());
        node.open(Arc::clone(&self.setup.plan), Arc::clone(&self.source) as Arc<dyn Source>).unwrap();
        self.counts.push(counts);
        self.source.nodes.write().unwrap().insert(NodeId(self.next_node), Arc::new(node));
        self.next_node += 1;
    }

    pub fn nodes(&self) -> Vec<(NodeId, Arc<LocalNode>)> {
        self.source.nodes.read().unwrap().iter().map(|(id, node)| (*id, Arc::clone(node))).collect()
    }

    fn any(&mut self) -> (NodeId, Arc<LocalNode>) {
        let nodes = self.nodes();
        let at = self.draw.below(nodes.len());
        nodes[at].clone()
    }

    /// Everything anybody holds, as their inventories say.
    pub fn holdings(&self) -> Vec<Holding> {
        let of = |(id, node): (NodeId, Arc<LocalNode>)| {
            let held = node.inventory().held.into_iter();
            held.map(move |held| Holding { node: id, address: String::new(), held })
        };
        self.nodes().into_iter().flat_map(of).collect()
    }

    fn grant(&mut self, node: NodeId, task: Task) -> Grant {
        self.next_lease += 1;
        let withhold = self.withhold_once_in > 0 && self.draw.once_in(self.withhold_once_in);
        let mut holdings = self.holdings();
        holdings.retain(|holding| !(withhold && matches!(holding.held, Held::Carry { .. })));
        let lease = Lease { id: LeaseId(self.next_lease), node, attempt: 1, task };
        Grant { lease, holdings }
    }

    pub fn execute(&mut self, task: Task) -> (Grant, Arc<LocalNode>, Result<Done, Failure>) {
        let (id, node) = self.any();
        let grant = self.grant(id, task);
        let done = node.execute(&grant, &Unwatched).map(|(done, _)| done);
        if let Ok(done) = &done {
            assert!(done.answers(&grant.lease.task), "{done:?}");
        }
        (grant, node, done)
    }

    /// Perhaps loses a node, with all it held; another takes its place.
    fn perhaps_drop(&mut self) {
        if self.drop_once_in == 0 || !self.draw.once_in(self.drop_once_in) {
            return;
        }
        let (lost, _) = self.any();
        self.source.nodes.write().unwrap().remove(&lost);
        self.owners.retain(|_, owner| *owner != lost);
        self.means.retain(|_, owner| *owner != lost);
        self.join();
    }

    fn shuffled_shards(&mut self) -> Vec<ShardId> {
        let mut shards: Vec<ShardId> = self.setup.plan.shard_ids().collect();
        self.draw.shuffle(&mut shards);
        shards
    }

    pub fn capture(&mut self, segment: SegmentId) {
        for shard in self.shuffled_shards() {
            if !self.peaks.contains_key(&(segment, shard)) || self.draw.once_in(4) {
                let (_, _, done) = self.execute(Task::Capture { segment, shard });
                let Done::Captured { peaks } = done.unwrap() else { panic!("no peaks") };
                let known = self.peaks.insert((segment, shard), peaks.clone());
                assert!(known.is_none_or(|known| known == peaks), "{segment} {shard}: other peaks");
                self.perhaps_drop();
            }
        }
    }

    pub fn agreed(&self, segment: SegmentId) -> Arc<Vec<PeakRecord>> {
        let mut all = Vec::new();
        let of_segment = self.peaks.range((segment, ShardId(0))..=(segment, ShardId(u32::MAX)));
        of_segment.for_each(|(_, peaks)| agree_peaks(&mut all, peaks));
        Arc::new(all)
    }

    pub fn accumulate(&mut self, segment: SegmentId) {
        let peaks = self.agreed(segment);
        for shard in self.shuffled_shards() {
            if self.owners.contains_key(&(segment, shard)) {
                continue;
            }
            let task = Task::Accumulate { segment, shard, peaks: Arc::clone(&peaks) };
            if self.draw.once_in(3) {
                let (grant, node, done) = self.execute(task.clone());
                done.unwrap();
                let verdict = if self.draw.once_in(2) { Verdict::Stale } else { Verdict::Duplicate };
                node.settle(grant.lease.id, verdict);
            }
            let (grant, node, done) = self.execute(task);
            done.unwrap();
            node.settle(grant.lease.id, Verdict::Accepted);
            node.settle(grant.lease.id, Verdict::Accepted);
            self.owners.insert((segment, shard), grant.lease.node);
            self.perhaps_drop();
        }
    }

    fn summed(&self, segment: SegmentId) -> bool {
        self.setup.plan.shard_ids().all(|shard| self.owners.contains_key(&(segment, shard)))
    }

    fn reduce(&mut self, layer: LayerId) {
        let layer = self.setup.plan.statistics_of(layer);
        let mut slices: Vec<SliceId> = self.setup.plan.slice_ids(layer).collect();
        self.draw.shuffle(&mut slices);
        for slice in slices {
            let stage = self.setup.plan.layer(layer).stage;
            if self.means.contains_key(&(layer, slice)) || !self.summed(stage) {
                continue;
            }
            let (grant, _, done) = self.execute(Task::Reduce { layer, slice });
            match done {
                Ok(_) => drop(self.means.insert((layer, slice), grant.lease.node)),
                Err(failure) => {
                    assert_eq!(failure.class, FailureClass::NonFinite, "{failure}");
                    let all = self.setup.plan.layers.iter().map(|entry| entry.id);
                    let readers = all.filter(|id| self.setup.plan.statistics_of(*id) == layer);
                    self.source.failed.lock().unwrap().extend(readers);
                    return;
                }
            }
            self.perhaps_drop();
        }
    }

    fn solve(&mut self, layer: LayerId) {
        let mut chunks: Vec<ChunkId> = self.setup.plan.chunk_ids(layer).collect();
        self.draw.shuffle(&mut chunks);
        for chunk in chunks {
            let statistics = self.setup.plan.statistics_of(layer);
            let mut slices = self.setup.plan.slice_ids(statistics);
            let reduced = slices.all(|slice| self.means.contains_key(&(statistics, slice)));
            let samples = self.setup.plan.solver.objective == Objective::Samples;
            let ready = reduced && (!samples || self.summed(self.setup.plan.layer(layer).stage));
            if !ready || self.source.roundings.lock().unwrap().contains_key(&(layer, chunk)) {
                continue;
            }
            let (_, _, done) = self.execute(Task::Solve { layer, chunk });
            let Done::Solved(rounding) = done.unwrap() else { panic!("no rounding") };
            self.source.roundings.lock().unwrap().insert((layer, chunk), rounding);
            self.perhaps_drop();
        }
    }

    fn decided(&self, layer: LayerId) -> bool {
        let roundings = self.source.roundings.lock().unwrap();
        self.source.failed.lock().unwrap().contains(&layer)
            || self.setup.plan.chunk_ids(layer).all(|chunk| roundings.contains_key(&(layer, chunk)))
    }

    /// From captured to decided, again and again until nothing is missing.
    pub fn finish_stage(&mut self, segment: SegmentId) {
        let layers = self.setup.plan.stages[segment.index()].solve.clone();
        for _ in 0..1000 {
            self.accumulate(segment);
            for layer in layers.iter().filter(|layer| !self.decided(**layer)).copied().collect::<Vec<_>>() {
                self.reduce(layer);
                self.solve(layer);
            }
            if layers.iter().all(|layer| self.decided(*layer)) {
                return;
            }
        }
        panic!("{segment}: never finished");
    }

    pub fn forward(&mut self, range: RangeId) {
        for shard in self.shuffled_shards() {
            let (_, _, done) = self.execute(Task::Forward { range, shard });
            assert_eq!(done.unwrap(), Done::Forwarded);
            self.perhaps_drop();
        }
    }

    /// The whole plan: stages of different ranges take turns.
    pub fn run(&mut self) -> Roundings {
        let plan = Arc::clone(&self.setup.plan);
        (0..plan.ranges.len() as u32 - 1).for_each(|range| self.forward(RangeId(range)));
        let longest = plan.ranges.iter().map(|range| range.len()).max().unwrap();
        for step in 0..longest {
            for range in plan.ranges.iter().filter(|range| step < range.len()) {
                let segment = SegmentId((range.start + step) as u32);
                self.capture(segment);
                self.finish_stage(segment);
            }
        }
        self.source.roundings.lock().unwrap().clone()
    }
}
