//! Cuts a graph into segments between the stages of sequential propagation.
//!
//! Level of a tensor: the number of quantized layers on the longest path to it. Stage `l` holds the layer uses
//! whose input has level `l`; segment `l` holds the nodes of level `l` that some layer's input still depends on,
//! and ends at boundary `l`, where stage `l` is captured and solved. Each such node lies in exactly one segment.
//! What is cut is anything that has steps ([`Flow`]): an ONNX graph or a decoder.
//! Not here: running segments (the executor), building their models (`extract`).

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::{Layer, Model, ModelError};

/// Something that computes step by step and can be cut.
pub trait Flow {
    /// Its nodes, each after those whose tensors it reads.
    fn steps(&self) -> Vec<Step<'_>>;
}

/// What one node reads and writes, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step<'a> {
    /// Computed tensors and inputs, each once.
    pub reads: Vec<&'a str>,
    /// Stored tensors.
    pub constants: Vec<&'a str>,
    /// Tensors it computes; no other node writes them.
    pub writes: Vec<&'a str>,
    /// Whether the quantized stream takes over what the original model computed here.
    pub shared: bool,
}

impl Flow for Model {
    fn steps(&self) -> Vec<Step<'_>> {
        let index = self.index();
        let nodes = self.graph().node.iter().enumerate();
        nodes
            .map(|(i, node)| {
                let (constants, reads) = index.reads(i).iter().partition(|name| index.is_constant(name));
                let writes = node.output.iter().filter(|o| !o.is_empty()).map(String::as_str).collect();
                Step { reads, constants, writes, shared: false }
            })
            .collect()
    }
}

/// The segments of a model, in the order they run. Empty if no layer is selected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// Segment `l` ends at stage `l`; nothing after the last stage runs.
    pub segments: Vec<Segment>,
}

/// The part of the model between two stages. A segment may have no nodes: stage 0 where every tap is a graph input.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Nodes to run, in graph order.
    pub nodes: Vec<usize>,
    /// What those nodes read from the carry: graph inputs and outputs of earlier segments. Sorted.
    pub inputs: Vec<String>,
    /// What those nodes produce for this boundary's taps or for later segments. Sorted.
    pub outputs: Vec<String>,
    /// Those of the outputs that only the original model computes: choices that both streams must make alike (which
    /// tokens an expert gets). The quantized stream does not run their nodes: the segment is run with these tensors
    /// given, beside `inputs`, as the original stream left them. Always in `outputs`; in `live_after` as long as a
    /// later segment reads them, where they count as inputs, again with the original's values. Sorted; empty for ONNX.
    #[serde(default)]
    pub shared: Vec<String>,
    /// Layer inputs of this stage, in layer order. Each is in `outputs`, or else a graph input.
    pub taps: Vec<Tap>,
    /// The carry after this boundary: every tensor, graph inputs included, that a later segment reads. Taps that
    /// nothing later reads are not in it: capture them first. Sorted.
    pub live_after: Vec<String>,
    /// Selected layers with a node in this segment. Ascending.
    pub layers_inside: Vec<usize>,
    /// Layers whose last use is tapped at this boundary: they are decided here. Ascending.
    pub decided: Vec<usize>,
}

/// One layer input that is captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tap {
    /// Index of the layer.
    pub layer: usize,
    /// Index into the layer's uses.
    pub use_index: usize,
    /// The tensor.
    pub tensor: String,
}

/// Cuts the model for the layers with `selected`; the others count as plain operators.
///
/// A layer with several uses is tapped at each use's own stage and decided at the last of them; each use raises
/// the level of what follows it.
///
/// # Errors
/// `Request` if `selected` has another length than `layers`; `Layer` if a use does not fit the model.
pub fn cut(flow: &impl Flow, layers: &[Layer], selected: &[bool]) -> Result<Cut, ModelError> {
    if layers.len() != selected.len() {
        return Err(ModelError::Request {
            subject: "selected layers".to_owned(),
            problem: format!("expected {} entries, found {}", layers.len(), selected.len()),
        });
    }
    let steps = flow.steps();
    let uses = layer_nodes(&steps, layers, selected)?;
    let levels = Levels::new(&steps, &uses);
    let taps = taps(&levels, layers, selected);
    let needed = needed_nodes(&steps, &levels, taps.iter().flatten());
    let mut segments = fill(&levels, taps, &needed);
    for segment in &mut segments {
        segment.layers_inside = inside(&segment.nodes, &uses);
    }
    decide(&mut segments);
    carry(&steps, &mut segments);
    Ok(Cut { segments })
}

/// The node of each selected use, with its layer and the tensor tapped.
type Uses<'a> = HashMap<usize, (usize, &'a str)>;

fn layer_nodes<'a>(
    steps: &[Step<'_>],
    layers: &'a [Layer],
    selected: &[bool],
) -> Result<Uses<'a>, ModelError> {
    let mut uses = HashMap::new();
    for (i, layer) in layers.iter().enumerate().filter(|(i, _)| selected[*i]) {
        let wrong = |problem: String| ModelError::Layer { layer: layer.name.clone(), problem };
        for layer_use in &layer.uses {
            let Some(step) = steps.get(layer_use.node) else {
                return Err(wrong(format!("node {} is not in the model", layer_use.node)));
            };
            let input = layer_use.input.as_str();
            if step.constants.contains(&input) {
                return Err(wrong(format!("its input `{input}` is a constant")));
            }
            if !step.reads.contains(&input) {
                return Err(wrong(format!("its node does not read tensor `{input}`")));
            }
            if uses.insert(layer_use.node, (i, input)).is_some() {
                return Err(wrong(format!("node {} belongs to two layers", layer_use.node)));
            }
        }
    }
    Ok(uses)
}

/// The level of each node, which is that of its outputs.
struct Levels<'a> {
    nodes: Vec<usize>,
    producers: HashMap<&'a str, usize>,
}

impl<'a> Levels<'a> {
    fn new(steps: &[Step<'a>], uses: &Uses<'_>) -> Levels<'a> {
        let mut levels = Levels { nodes: Vec::with_capacity(steps.len()), producers: HashMap::new() };
        for (i, step) in steps.iter().enumerate() {
            let reads = step.reads.iter().map(|name| levels.of(name));
            let mut level = reads.max().unwrap_or(0);
            if let Some((_, tapped)) = uses.get(&i) {
                level = level.max(levels.of(tapped) + 1);
            }
            levels.nodes.push(level);
            levels.producers.extend(step.writes.iter().map(|o| (*o, i)));
        }
        levels
    }

    /// Level of a tensor; 0 for what the model is given.
    fn of(&self, tensor: &str) -> usize {
        self.producer(tensor).map_or(0, |n| self.nodes[n])
    }

    fn producer(&self, tensor: &str) -> Option<usize> {
        self.producers.get(tensor).copied()
    }
}

/// The taps of each stage. Every level below a layer's has a layer, so no stage is empty.
fn taps(levels: &Levels<'_>, layers: &[Layer], selected: &[bool]) -> Vec<Vec<Tap>> {
    let mut stages: Vec<Vec<Tap>> = Vec::new();
    for (layer, l) in layers.iter().enumerate().filter(|(i, _)| selected[*i]) {
        for (use_index, layer_use) in l.uses.iter().enumerate() {
            let level = levels.of(&layer_use.input);
            if stages.len() <= level {
                stages.resize_with(level + 1, Vec::new);
            }
            stages[level].push(Tap { layer, use_index, tensor: layer_use.input.clone() });
        }
    }
    stages
}

/// Which nodes some tap depends on.
fn needed_nodes<'a>(
    steps: &[Step<'_>],
    levels: &Levels<'_>,
    taps: impl Iterator<Item = &'a Tap>,
) -> Vec<bool> {
    let mut needed = vec![false; steps.len()];
    let mut pending: Vec<usize> = taps.filter_map(|t| levels.producer(&t.tensor)).collect();
    while let Some(n) = pending.pop() {
        if !std::mem::replace(&mut needed[n], true) {
            pending.extend(steps[n].reads.iter().filter_map(|name| levels.producer(name)));
        }
    }
    needed
}

fn fill(levels: &Levels<'_>, taps: Vec<Vec<Tap>>, needed: &[bool]) -> Vec<Segment> {
    let stages = taps.into_iter();
    let mut segments: Vec<Segment> = stages.map(|taps| Segment { taps, ..Segment::default() }).collect();
    for (n, level) in levels.nodes.iter().enumerate().filter(|(n, _)| needed[*n]) {
        // A needed node is an ancestor of a tap, so its level is at most the last stage's.
        if let Some(segment) = segments.get_mut(*level) {
            segment.nodes.push(n);
        }
    }
    segments
}

fn inside(nodes: &[usize], uses: &Uses<'_>) -> Vec<usize> {
    let layers: BTreeSet<usize> = nodes.iter().filter_map(|n| uses.get(n)).map(|u| u.0).collect();
    layers.into_iter().collect()
}

/// Marks each layer as decided at the last stage that taps it.
fn decide(segments: &mut [Segment]) {
    let mut done = BTreeSet::new();
    for segment in segments.iter_mut().rev() {
        let layers: BTreeSet<usize> = segment.taps.iter().map(|t| t.layer).collect();
        segment.decided = layers.into_iter().filter(|l| done.insert(*l)).collect();
    }
}

/// Fills inputs, outputs and live sets, walking backwards from the last boundary.
fn carry(steps: &[Step<'_>], segments: &mut [Segment]) {
    let mut live: BTreeSet<String> = BTreeSet::new();
    for segment in segments.iter_mut().rev() {
        segment.live_after = live.iter().cloned().collect();
        let inside = || segment.nodes.iter().filter_map(|n| steps.get(*n));
        let produced: BTreeSet<&str> = inside().flat_map(|step| step.writes.iter().copied()).collect();
        let shared: BTreeSet<String> = inside()
            .filter(|step| step.shared)
            .flat_map(|step| step.writes.iter().map(|t| (*t).to_owned()))
            .collect();
        let wanted = segment.taps.iter().map(|t| &t.tensor).chain(&live).chain(&shared);
        let outputs: BTreeSet<String> = wanted.filter(|t| produced.contains(t.as_str())).cloned().collect();
        let reads = inside().flat_map(|step| step.reads.iter().copied());
        let inputs: BTreeSet<String> = reads.filter(|t| !produced.contains(t)).map(str::to_owned).collect();
        // A tapped graph input must be in the carry before the first boundary; it is not produced anywhere.
        live.retain(|t| !produced.contains(t.as_str()));
        live.extend(inputs.iter().cloned());
        segment.inputs = inputs.into_iter().collect();
        segment.outputs = outputs.into_iter().collect();
        segment.shared = shared.into_iter().collect();
    }
}
