//! The node's reading of the model: layers, segments, and what it runs of them.
//!
//! An ONNX graph or a language model's decoder, whichever the program blob holds; the difference ends here.
//! Built from the graph alone; constants are fetched when a segment needs them and dropped with it. A layer with
//! several uses is tapped where it is solved: inputs of its earlier uses stay in the carry until then, so that the sums
//! of a stage are all there is to know about its layers. Layers that read the same rows are tapped once.

use crate::devices::Devices;
use crate::{failure, transit};
use halfstep_exec::{Engine, ExecError, Session};
use halfstep_model::decoder::{CarryPrecision, DecoderProgram};
use halfstep_model::{Cut, Layer, Model, Segment, Tensor, cut, extract, list_layers, outline};
use halfstep_quant::ScaleType;
use halfstep_work::{Failure, LayerId, Plan, Propagation, RangeId, SegmentId, Source};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

/// What is run.
enum Graph {
    Onnx(Box<Model>),
    Decoder(Box<DecoderProgram>),
}

pub(crate) struct Program {
    graph: Graph,
    /// In plan order.
    pub(crate) layers: Vec<Layer>,
    pub(crate) cut: Cut,
    /// Of each range: tensors that have a value of their own in its quantized stream.
    parted: Vec<BTreeSet<String>>,
}

impl Program {
    /// # Errors
    /// `Internal` if this node sees other layers or stages than the plan.
    pub(crate) fn new(plan: &Plan, source: &dyn Source) -> Result<Self, Failure> {
        let graph = Graph::read(source)?;
        let listed = graph.layers()?;
        let mut by_name: BTreeMap<String, Layer> = listed.into_iter().map(|l| (l.name.clone(), l)).collect();
        let layers: Result<Vec<Layer>, Failure> = plan
            .layers
            .iter()
            .map(|entry| {
                by_name
                    .remove(&entry.name)
                    .filter(|l| (l.rows, l.cols, l.groups) == (entry.rows, entry.cols, entry.groups))
                    .ok_or_else(|| {
                        failure::internal(format!(
                            "layer `{}`: the graph disagrees with the plan",
                            entry.name
                        ))
                    })
            })
            .collect();
        let layers = layers?;
        let mut cut = graph.cut(&layers)?;
        if cut.segments.len() != plan.stages.len() {
            return Err(failure::internal(format!(
                "model: cut into {} segments, the plan has {} stages",
                cut.segments.len(),
                plan.stages.len()
            )));
        }
        tap_where_solved(plan, &mut cut)?;
        tap_once(plan, &layers, &mut cut)?;
        let parted = parted(plan, &cut);
        Ok(Self { graph, layers, cut, parted })
    }

    /// Shows the engine everything it will have to run.
    ///
    /// # Errors
    /// `BadInput`, naming an operator that the engine does not have and its node.
    pub(crate) fn check(&self, engine: &dyn Engine) -> Result<(), Failure> {
        // Every operator of a decoder is computed here.
        let Graph::Onnx(model) = &self.graph else { return Ok(()) };
        let runs = |segment: &&Segment| !segment.outputs.is_empty();
        let nodes: Vec<usize> =
            self.cut.segments.iter().filter(runs).flat_map(|segment| &segment.nodes).copied().collect();
        if nodes.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let outline = outline(model, &nodes).map_err(failure::model)?;
        engine.check(outline).map_err(failure::exec)?;
        tracing::debug!(nodes = nodes.len(), elapsed_ms = begun.elapsed().as_millis(), "operators checked");
        Ok(())
    }

    /// Whether a tensor has a value of its own in a range's quantized stream: known from the plan alone.
    pub(crate) fn is_parted(&self, range: RangeId, tensor: &str) -> bool {
        self.parted.get(range.index()).is_some_and(|parted| parted.contains(tensor))
    }

    /// Whether a layer's statistics have both streams: all of its uses do, or none.
    pub(crate) fn differs(&self, plan: &Plan, id: LayerId) -> bool {
        let range = plan.range_of(plan.layer(id).stage);
        self.layer(id).uses.iter().any(|one| self.is_parted(range, &one.input))
    }

    /// Names in the carry of a range once `boundary` segments have run. Before the range begins there are no taps.
    pub(crate) fn carried(&self, plan: &Plan, range: RangeId, boundary: usize) -> BTreeSet<&str> {
        let Some(last) = boundary.checked_sub(1) else { return BTreeSet::new() };
        let Some(segment) = self.cut.segments.get(last) else { return BTreeSet::new() };
        let begun = plan.ranges.get(range.index()).is_some_and(|range| last >= range.start);
        let taps = segment.taps.iter().filter(|_| begun).map(|tap| tap.tensor.as_str());
        segment.live_after.iter().map(String::as_str).chain(taps).collect()
    }

    pub(crate) fn segment(&self, index: usize) -> Result<&Segment, Failure> {
        let found = self.cut.segments.get(index);
        found.ok_or_else(|| {
            failure::internal(format!("segment {index}: there are {}", self.cut.segments.len()))
        })
    }

    /// Whether the quantized stream runs a segment by itself.
    pub(crate) fn parts(&self, plan: &Plan, id: SegmentId, segment: &Segment) -> bool {
        runs_apart(plan, id, segment, |name| self.is_parted(plan.range_of(id), name))
    }

    /// The segment ready to run, and the bytes of its model; `replace` overrides constants by name. ONNX graphs run on the
    /// engine, decoders on the devices.
    pub(crate) fn load(
        &self,
        engine: &dyn Engine,
        devices: &Devices,
        segment: &Segment,
        source: &dyn Source,
        replace: BTreeMap<String, Tensor>,
    ) -> Result<(Arc<dyn Session>, usize), Failure> {
        match &self.graph {
            Graph::Onnx(model) => load_onnx(model, engine, segment, source, replace),
            Graph::Decoder(program) => load_decoder(program, devices, segment, source, replace),
        }
    }

    /// Why segments run on the CPU though there are other devices, for the log.
    pub(crate) fn left_to_cpu(&self, devices: &Devices) -> Option<String> {
        match &self.graph {
            Graph::Onnx(_) => None,
            Graph::Decoder(program) => devices.left_to_cpu(&program.decoder),
        }
    }

    /// Values of what passes from segment to segment.
    pub(crate) fn carries(&self) -> CarryPrecision {
        match &self.graph {
            Graph::Onnx(_) => CarryPrecision::F32,
            Graph::Decoder(program) => program.carries,
        }
    }

    /// Values that scales may have.
    pub(crate) fn scales(&self) -> ScaleType {
        match &self.graph {
            Graph::Onnx(_) => ScaleType::F32,
            Graph::Decoder(program) => program.scales,
        }
    }

    pub(crate) fn layer(&self, id: LayerId) -> &Layer {
        &self.layers[id.index()]
    }
}

impl Graph {
    fn read(source: &dyn Source) -> Result<Self, Failure> {
        let blob = source.program().map_err(failure::source)?;
        if DecoderProgram::is_one(&blob) {
            let program = DecoderProgram::from_bytes(&blob).map_err(failure::internal)?;
            return Ok(Self::Decoder(Box::new(program)));
        }
        Ok(Self::Onnx(Box::new(Model::from_bytes(blob).map_err(failure::model)?)))
    }

    fn layers(&self) -> Result<Vec<Layer>, Failure> {
        match self {
            Self::Onnx(model) => list_layers(model).map(|(layers, _)| layers).map_err(failure::model),
            Self::Decoder(program) => Ok(program.decoder.layers().0),
        }
    }

    fn cut(&self, layers: &[Layer]) -> Result<Cut, Failure> {
        let all = vec![true; layers.len()];
        match self {
            Self::Onnx(model) => cut(model.as_ref(), layers, &all).map_err(failure::model),
            Self::Decoder(program) => cut(&program.decoder, layers, &all).map_err(failure::model),
        }
    }
}

fn fetch(source: &dyn Source, name: &str) -> Result<Tensor, Failure> {
    transit::tensor(&source.constant(name).map_err(failure::source)?)
}

/// The segment as a model of its own, loaded by the engine.
fn load_onnx(
    model: &Model,
    engine: &dyn Engine,
    segment: &Segment,
    source: &dyn Source,
    mut replace: BTreeMap<String, Tensor>,
) -> Result<(Arc<dyn Session>, usize), Failure> {
    let index = model.index();
    let mut names: BTreeSet<String> = BTreeSet::new();
    for node in &segment.nodes {
        let read = index.reads(*node).iter().map(|name| name.to_string());
        names.extend(read.filter(|name| model.has_initializer(name)));
    }
    for name in names {
        if let Entry::Vacant(vacant) = replace.entry(name) {
            let constant = fetch(source, vacant.key())?;
            vacant.insert(constant);
        }
    }
    let sub_model = extract(model, &segment.nodes, &segment.inputs, &segment.outputs, &replace);
    let sub_model = sub_model.map_err(failure::model)?;
    let bytes = sub_model.len();
    Ok((Arc::from(engine.load(sub_model).map_err(failure::exec)?), bytes))
}

fn load_decoder(
    program: &DecoderProgram,
    devices: &Devices,
    segment: &Segment,
    source: &dyn Source,
    mut replace: BTreeMap<String, Tensor>,
) -> Result<(Arc<dyn Session>, usize), Failure> {
    // What the source says is worth more than that a constant could not be had.
    let mut lost = None;
    let mut constant = |name: &str| match replace.remove(name) {
        Some(tensor) => Ok(tensor),
        None => fetch(source, name).map_err(|failure| {
            let message = failure.message.clone();
            lost = Some(failure);
            ExecError::Internal(message)
        }),
    };
    let loaded = devices.load(&program.decoder, &segment.nodes, program.factors, &mut constant);
    loaded.map_err(|error| lost.unwrap_or_else(|| failure::exec(error)))
}

/// Moves the taps of a layer's earlier uses to the stage where it is solved, and keeps their tensors until then.
fn tap_where_solved(plan: &Plan, cut: &mut Cut) -> Result<(), Failure> {
    for at in 0..cut.segments.len() {
        for tap in std::mem::take(&mut cut.segments[at].taps) {
            let stage = plan.layers[tap.layer].stage.index();
            if stage < at || stage >= cut.segments.len() {
                let name = &plan.layers[tap.layer].name;
                return Err(failure::internal(format!(
                    "layer `{name}`: stage {stage}, but it is used after {at}"
                )));
            }
            for segment in &mut cut.segments[at..stage] {
                if let Err(place) = segment.live_after.binary_search(&tap.tensor) {
                    segment.live_after.insert(place, tap.tensor.clone());
                }
            }
            cut.segments[stage].taps.push(tap);
        }
        // A later segment's own taps are still to come: it is sorted when its turn comes.
        cut.segments[at].taps.sort_by_key(|tap| (tap.layer, tap.use_index));
    }
    Ok(())
}

/// Leaves out the taps of layers that are solved with another's statistics.
fn tap_once(plan: &Plan, layers: &[Layer], cut: &mut Cut) -> Result<(), Failure> {
    for (entry, layer) in plan.layers.iter().zip(layers) {
        let lender = plan.statistics_of(entry.id);
        if !layer.reads_rows_of(&layers[lender.index()]) {
            return Err(failure::internal(format!(
                "layer `{}`: the plan has it share the statistics of `{}`, which reads other rows",
                layer.name,
                layers[lender.index()].name
            )));
        }
    }
    for segment in &mut cut.segments {
        segment.taps.retain(|tap| plan.layers[tap.layer].statistics_of.is_none());
    }
    Ok(())
}

fn runs_apart(plan: &Plan, id: SegmentId, segment: &Segment, is_parted: impl Fn(&str) -> bool) -> bool {
    let decided = |layer: &usize| plan.is_decided_in(LayerId(*layer as u32), id);
    plan.propagation == Propagation::Sequential
        && (segment.layers_inside.iter().any(decided) || segment.inputs.iter().any(|name| is_parted(name)))
}

fn parted(plan: &Plan, cut: &Cut) -> Vec<BTreeSet<String>> {
    let mut all = vec![BTreeSet::new(); plan.ranges.len()];
    for (index, segment) in cut.segments.iter().enumerate() {
        let id = SegmentId(index as u32);
        let Some(parted) = all.get_mut(plan.range_of(id).index()) else { continue };
        if runs_apart(plan, id, segment, |name| parted.contains(name)) {
            let own = segment.outputs.iter().filter(|name| !segment.shared.contains(name));
            parted.extend(own.cloned());
        }
    }
    all
}
