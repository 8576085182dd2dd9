//! A segment of a decoder as a session: which operators a run needs, in which order, and when a tensor is dropped.
//!
//! Not here: the operators (`operators`), their weights (`step`).

use super::check::Batch;
use super::kinds::{Kind, kinds, refuse};
use super::operators::{Input, Run};
use super::positions::Tables;
use super::step::{Known, Loader, Role, Step, Weights};
use crate::carry::Carried;
use crate::engine::Session;
use crate::error::ExecError;
use halfstep_compute::Host;
use halfstep_compute::decoder::{FactorOf, Lane, Place, TableOf, WeightsOf};
use halfstep_model::Tensor;
use halfstep_model::decoder::{CarryPrecision, Decoder, Rotary};
use std::borrow::Borrow;
use std::collections::HashMap;
use std::sync::Arc;

/// Name of this engine in messages.
pub(super) const NAME: &str = "decoder";

/// Some of a decoder's nodes with their weights, ready to run.
///
/// Tensors: `input_ids` `[n, T]` i64 with -1 behind the end of a shorter sequence, `lengths` `[n]` i64, all others
/// f32 `[P, width]`, `P` the sum of the lengths (the rows of an expert: fewer). A tensor given as an input is not
/// computed: a node all of whose outputs are given, or whose outputs nobody needs, does not run. A run is computed, or
/// queued on one lane of the place, by the calling thread in a fixed order: its bits depend on the place's kind alone.
pub struct DecoderSession<P: Place = Host> {
    pub(super) place: Arc<P>,
    pub(super) steps: Vec<Step>,
    pub(super) slots: Vec<Slot>,
    /// Slots by name.
    names: HashMap<String, usize>,
    /// By number.
    weights: Vec<Kept<P>>,
    pub(super) rotations: Vec<Rotary>,
    /// Of every device.
    pub(super) tables: Vec<Tables<TableOf<P>>>,
    pub(super) vocabulary: usize,
    bytes: usize,
}

impl<P: Place> std::fmt::Debug for DecoderSession<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecoderSession").field("steps", &self.steps).finish_non_exhaustive()
    }
}

/// A constant, on every device.
enum Kept<P: Place> {
    Array(Vec<WeightsOf<P>>),
    Factor(Vec<FactorOf<P>>),
}

/// A tensor of the segment.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) name: String,
    pub(super) kind: Kind,
}

impl DecoderSession {
    /// [`DecoderSession::load_at`] the CPU.
    ///
    /// # Errors
    /// The same.
    pub fn load(
        decoder: &Decoder,
        nodes: &[usize],
        constants: &mut dyn FnMut(&str) -> Result<Tensor, ExecError>,
    ) -> Result<Self, ExecError> {
        Self::load_at(Arc::default(), decoder, nodes, CarryPrecision::F32, constants)
    }
}

impl<P: Place> DecoderSession<P> {
    /// Makes the `nodes` of `decoder` (ascending) ready to run. `constants` gives f32 weights by name; it is asked
    /// once for each, or twice for an embedding that is also the head of the same segment. Weights go to every device of the
    /// place one by one. `factors`: what linear layers' weights and inputs may be rounded to where a device multiplies them.
    ///
    /// # Errors
    /// `Load`, naming a node that breaks a rule of [`Decoder::validate`] or whose inputs do not fit its operator, or nodes that are not ascending or not there;
    /// `Tensor` for a weight of another shape or type than its operator says; `Device` if there is no room for it; whatever
    /// `constants` says.
    pub fn load_at(
        place: Arc<P>,
        decoder: &Decoder,
        nodes: &[usize],
        factors: CarryPrecision,
        constants: &mut dyn FnMut(&str) -> Result<Tensor, ExecError>,
    ) -> Result<Self, ExecError> {
        check_order(decoder, nodes)?;
        decoder.validate().map_err(|error| fault(error.node, error.problem))?;
        let kinds = kinds(decoder)?;
        let mut slots = Slots { kinds: &kinds, names: HashMap::new(), slots: Vec::new() };
        let mut weights = Vec::new();
        let mut keep = |values, role| -> Result<(), ExecError> {
            weights.push(match role {
                Role::Array => Kept::Array(place.keep(values)?),
                Role::Factor => Kept::Factor(place.keep_factor(values, factors == CarryPrecision::Bf16)?),
            });
            Ok(())
        };
        let mut loader = Loader {
            decoder,
            constants,
            keep: &mut keep,
            turned: place.wants_turned_weights(),
            known: Known::default(),
            rotations: Vec::new(),
        };
        let mut steps = Vec::with_capacity(nodes.len());
        for node in nodes.iter().filter_map(|index| decoder.nodes.get(*index)) {
            let mut of =
                |names: &[String]| names.iter().map(|name| slots.of(name)).collect::<Option<Vec<_>>>();
            let (Some(reads), Some(writes)) = (of(&node.inputs), of(&node.outputs)) else {
                return Err(refuse(node, "a tensor of unknown kind".into()));
            };
            steps.push(Step { name: node.name.clone(), op: loader.ready(node)?, reads, writes });
        }
        let (bytes, rotations) = (loader.known.bytes(), loader.rotations);
        let (names, slots) = (slots.names, slots.slots);
        let tables = (0..place.devices()).map(|_| Tables::default()).collect();
        let vocabulary = decoder.vocabulary;
        Ok(Self { place, steps, slots, names, weights, rotations, tables, vocabulary, bytes })
    }

    /// Weights on a device.
    pub(super) fn weight(
        &self,
        number: Weights,
        device: usize,
    ) -> Result<&<P::Lane as Lane>::Array, ExecError> {
        match self.weights.get(number) {
            Some(Kept::Array(everywhere)) => everywhere.get(device).map(Borrow::borrow),
            _ => None,
        }
        .ok_or_else(|| missing(number, device))
    }

    /// A linear layer's weights on a device.
    pub(super) fn factor(
        &self,
        number: Weights,
        device: usize,
    ) -> Result<&<P::Lane as Lane>::Factor, ExecError> {
        match self.weights.get(number) {
            Some(Kept::Factor(everywhere)) => everywhere.get(device),
            _ => None,
        }
        .ok_or_else(|| missing(number, device))
    }

    /// Memory of its weights, on one device.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn slot(&self, name: &str) -> Result<usize, ExecError> {
        self.names.get(name).copied().ok_or_else(|| ExecError::Missing { name: name.to_owned() })
    }

    /// The steps that `outputs` need where `given` tensors are there already, and how often each tensor is still
    /// wanted.
    fn plan(&self, given: impl Fn(usize) -> bool, outputs: &[usize]) -> Result<Plan, ExecError> {
        let mut wanted = vec![0usize; self.slots.len()];
        outputs.iter().for_each(|slot| wanted[*slot] += 1);
        let mut steps = Vec::new();
        let mut written = vec![false; self.slots.len()];
        for (index, step) in self.steps.iter().enumerate().rev() {
            if step.writes.iter().any(|slot| wanted[*slot] > 0 && !given(*slot)) {
                steps.push(index);
                step.reads.iter().for_each(|slot| wanted[*slot] += 1);
                step.writes.iter().for_each(|slot| written[*slot] = true);
            }
        }
        steps.reverse();
        match (0..self.slots.len()).find(|slot| wanted[*slot] > 0 && !written[*slot] && !given(*slot)) {
            Some(slot) => Err(ExecError::Missing { name: self.slots[slot].name.clone() }),
            None => Ok(Plan { steps, wanted }),
        }
    }
}

/// What a run does.
struct Plan {
    /// Indices of steps, ascending.
    steps: Vec<usize>,
    /// Per slot: readers and places among the outputs.
    wanted: Vec<usize>,
}

impl<P: Place> Session for DecoderSession<P> {
    fn run(&self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>, ExecError> {
        let inputs: Vec<(&str, Input<'_>)> =
            inputs.iter().map(|(name, tensor)| (*name, Input::Tensor(tensor))).collect();
        let found = self.carry(&inputs, outputs, CarryPrecision::F32)?;
        found.into_iter().map(|carried| Ok(Arc::unwrap_or_clone(carried.tensor()?))).collect()
    }

    /// On a device, numbers of halves are rounded and widened there.
    fn run_carried(
        &self,
        inputs: &[(&str, &Carried)],
        outputs: &[&str],
        precision: CarryPrecision,
    ) -> Result<Vec<Carried>, ExecError> {
        let inputs: Vec<(&str, Input<'_>)> =
            inputs.iter().map(|(name, carried)| (*name, Input::of(carried))).collect();
        self.carry(&inputs, outputs, precision)
    }
}

impl<P: Place> DecoderSession<P> {
    fn carry(
        &self,
        inputs: &[(&str, Input<'_>)],
        outputs: &[&str],
        precision: CarryPrecision,
    ) -> Result<Vec<Carried>, ExecError> {
        let mut batch = Batch::default();
        let mut given = vec![None; self.slots.len()];
        for (name, input) in inputs {
            let slot = self.slot(name)?;
            batch.admit(name, self.slots[slot].kind, *input, self.vocabulary)?;
            given[slot] = Some(*input);
        }
        let outputs = outputs.iter().map(|name| self.slot(name)).collect::<Result<Vec<_>, _>>()?;
        let plan = self.plan(|slot| given[slot].is_some(), &outputs)?;
        self.place.with(|device, lane| {
            lane.begin(batch.tokens);
            let result = execute(&mut Run::new(self, device, lane, given), plan, &outputs, precision)?;
            lane.finish()?;
            Ok(result)
        })
    }
}

fn execute<P: Place>(
    run: &mut Run<'_, P>,
    plan: Plan,
    outputs: &[usize],
    precision: CarryPrecision,
) -> Result<Vec<Carried>, ExecError> {
    let Plan { steps, mut wanted } = plan;
    for index in steps {
        let step = run.execute(index)?;
        for slot in &step.reads {
            wanted[*slot] -= 1;
        }
        for slot in step.reads.iter().chain(&step.writes).filter(|slot| wanted[**slot] == 0) {
            run.forget(*slot);
        }
    }
    outputs
        .iter()
        .map(|slot| {
            wanted[*slot] -= 1;
            run.output(*slot, wanted[*slot] == 0, precision)
        })
        .collect()
}

/// Numbers the tensors that a segment touches.
struct Slots<'a> {
    kinds: &'a HashMap<&'a str, Kind>,
    names: HashMap<String, usize>,
    slots: Vec<Slot>,
}

impl Slots<'_> {
    fn of(&mut self, name: &str) -> Option<usize> {
        if let Some(slot) = self.names.get(name) {
            return Some(*slot);
        }
        let kind = *self.kinds.get(name)?;
        self.slots.push(Slot { name: name.to_owned(), kind });
        self.names.insert(name.to_owned(), self.slots.len() - 1);
        Some(self.slots.len() - 1)
    }
}

fn missing(number: Weights, device: usize) -> ExecError {
    ExecError::Internal(format!("decoder: no weights {number} on device {device}"))
}

fn check_order(decoder: &Decoder, nodes: &[usize]) -> Result<(), ExecError> {
    let ascending = nodes.windows(2).all(|pair| pair[0] < pair[1]);
    if ascending && nodes.last().is_none_or(|last| *last < decoder.nodes.len()) {
        return Ok(());
    }
    let reason = format!("nodes {nodes:?} of {}, expected ascending indices", decoder.nodes.len());
    Err(fault(String::new(), reason))
}

fn fault(node: String, reason: String) -> ExecError {
    ExecError::Load { engine: NAME.into(), node, op_type: String::new(), reason }
}
