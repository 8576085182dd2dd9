//! What each operator computes, tensor by tensor.
//!
//! Not here: kernels (`compute`), when an operator runs (`session`).

use super::check::{describe, lengths_of, wrong};
use super::kinds::Kind;
use super::positions::alike;
use super::session::{DecoderSession, Slot};
use super::step::{Learned, Matrix, Ready, Step, Weights};
use crate::ExecError;
use crate::carry::{Carried, Halves, OnDevice};
use halfstep_compute::Activation;
use halfstep_compute::decoder::{Embedding, Heads, Lane, Linear, Place, Strided, TableOf, Turn};
use halfstep_model::decoder::{Attend, CarryPrecision, Route, Select, TOKENS};
use halfstep_model::{Data, Tensor};
use std::borrow::{Borrow, BorrowMut};
use std::ops::Range;
use std::sync::Arc;

/// One run of a session on a lane.
pub(super) struct Run<'a, P: Place> {
    session: &'a DecoderSession<P>,
    /// The lane's device.
    device: usize,
    lane: &'a mut P::Lane,
    tensors: Tensors<'a, P::Lane>,
    /// Sequences by the slot of their lengths, and these.
    sequences: Option<(usize, Vec<usize>, <P::Lane as Lane>::Sequences)>,
    /// Tokens of experts, by the slot of their weights and whether they get all.
    choices: Vec<(usize, bool, <P::Lane as Lane>::Choice)>,
}

/// A tensor from outside.
#[derive(Debug, Clone, Copy)]
pub(super) enum Input<'a> {
    Tensor(&'a Tensor),
    Halves(&'a Halves),
    OnDevice(&'a OnDevice),
}

impl<'a> Input<'a> {
    pub(super) fn of(carried: &'a Carried) -> Self {
        match carried {
            Carried::Whole(tensor) => Self::Tensor(tensor),
            Carried::Halves(halves) => Self::Halves(halves),
            Carried::OnDevice(there) => Self::OnDevice(there),
        }
    }

    pub(super) fn dims(self) -> &'a [usize] {
        match self {
            Self::Tensor(tensor) => &tensor.shape,
            Self::Halves(halves) => &halves.dims,
            Self::OnDevice(there) => &there.dims,
        }
    }

    /// How many values, if they are f32.
    pub(super) fn floats(self) -> Option<usize> {
        match self {
            Self::Tensor(tensor) => tensor.as_f32().map(<[f32]>::len),
            Self::Halves(halves) => Some(halves.values.len()),
            Self::OnDevice(there) => Some(there.values.len()),
        }
    }

    fn tensor(self) -> Option<&'a Tensor> {
        match self {
            Self::Tensor(tensor) => Some(tensor),
            Self::Halves(_) | Self::OnDevice(_) => None,
        }
    }

    /// What it is, for messages.
    pub(super) fn describe(self) -> String {
        match self {
            Self::Tensor(tensor) => describe(tensor),
            Self::Halves(_) | Self::OnDevice(_) => format!("bfloat16 {:?}", self.dims()),
        }
    }
}

/// The tensors of one run.
struct Tensors<'a, L: Lane> {
    slots: &'a [Slot],
    given: Vec<Option<Input<'a>>>,
    /// Of those given, what a step has read so far.
    read: Vec<Option<L::Given<'a>>>,
    made: Vec<Option<Made<L>>>,
}

enum Made<L: Lane> {
    Rows { array: L::Owned, rows: usize, width: usize },
    Lengths(Vec<i64>),
}

/// An f32 tensor: its array, how many rows, how wide.
type Rows<'a, L> = (&'a <L as Lane>::Array, usize, usize);

impl<'a, L: Lane> Tensors<'a, L> {
    fn missing(&self, slot: usize) -> ExecError {
        ExecError::Missing { name: self.slots[slot].name.clone() }
    }

    /// Brings a given tensor where operators can read it.
    fn admit(&mut self, lane: &mut L, slot: usize) -> Result<(), ExecError> {
        if self.made[slot].is_none()
            && self.read[slot].is_none()
            && let Some(given) = self.given[slot]
        {
            self.read[slot] = match given {
                Input::Tensor(tensor) => tensor.as_f32().map(|values| lane.given(values)).transpose()?,
                Input::Halves(halves) => Some(lane.given_halves(&halves.values)?),
                Input::OnDevice(there) => Some(lane.given_staying(&there.values)?),
            };
        }
        Ok(())
    }

    fn rows(&self, slot: usize) -> Result<Rows<'_, L>, ExecError> {
        if let Some(Made::Rows { array, rows, width }) = &self.made[slot] {
            return Ok((array.borrow(), *rows, *width));
        }
        match (self.given[slot].map(Input::dims), &self.read[slot]) {
            (Some([rows, width]), Some(array)) => Ok((array.borrow(), *rows, *width)),
            (None, _) if self.made[slot].is_none() => Err(self.missing(slot)),
            _ => Err(ExecError::Internal(format!("decoder: `{}` is not f32", self.slots[slot].name))),
        }
    }

    /// An input of a step.
    fn of(&self, step: &Step, input: usize) -> Result<Rows<'_, L>, ExecError> {
        self.rows(step.reads[input])
    }

    /// A second input that must have as many rows as the first.
    fn second(&self, step: &Step, rows: usize) -> Result<Rows<'_, L>, ExecError> {
        match self.of(step, 1)? {
            second if second.1 == rows => Ok(second),
            (_, found, _) => {
                let name = &self.slots[step.reads[1]].name;
                Err(wrong(name, format!("{rows} rows, as the other input has"), format!("{found}")))
            }
        }
    }

    fn lengths(&self, slot: usize) -> Result<Vec<usize>, ExecError> {
        let lengths =
            match (&self.made[slot], self.given[slot].and_then(Input::tensor).and_then(Tensor::as_i64)) {
                (Some(Made::Lengths(lengths)), _) => lengths.as_slice(),
                (_, Some(lengths)) => lengths,
                _ => return Err(self.missing(slot)),
            };
        // Checked when they came in.
        Ok(lengths.iter().map(|length| usize::try_from(*length).unwrap_or(0)).collect())
    }

    /// Keeps what a step made unless it was given.
    fn keep(&mut self, slot: usize, made: Made<L>) {
        if self.given[slot].is_none() {
            self.made[slot] = Some(made);
        }
    }

    /// Width of a step's output.
    fn width(&self, step: &Step) -> usize {
        match self.slots[step.writes[0]].kind {
            Kind::Rows { width, .. } => width,
            _ => 0,
        }
    }
}

impl<'a, P: Place> Run<'a, P> {
    pub(super) fn new(
        session: &'a DecoderSession<P>,
        device: usize,
        lane: &'a mut P::Lane,
        given: Vec<Option<Input<'a>>>,
    ) -> Self {
        let slots = given.len();
        let tensors = Tensors {
            slots: &session.slots,
            given,
            read: (0..slots).map(|_| None).collect(),
            made: (0..slots).map(|_| None).collect(),
        };
        Self { session, device, lane, tensors, sequences: None, choices: Vec::new() }
    }

    /// Runs a step; what it writes is kept unless it was given.
    pub(super) fn execute(&mut self, index: usize) -> Result<&'a Step, ExecError> {
        let step = &self.session.steps[index];
        for slot in &step.reads {
            self.tensors.admit(self.lane, *slot)?;
        }
        if let Ready::Embed { weight, scale, positions, width } = &step.op {
            self.embed(step, *weight, *scale, positions.as_ref(), *width)?;
            return Ok(step);
        }
        let rows = match &step.op {
            Ready::Select(select) => self.select_rows(step, select)?,
            _ => self.tensors.of(step, 0)?.1,
        };
        let width = self.tensors.width(step);
        let mut array = self.array(step, rows, width)?;
        self.compute(step, (rows, width), array.borrow_mut())?;
        self.tensors.keep(step.writes[0], Made::Rows { array, rows, width });
        Ok(step)
    }

    /// Drops a tensor that nothing reads any more.
    pub(super) fn forget(&mut self, slot: usize) {
        self.tensors.read[slot] = None;
        self.choices.retain(|(of, ..)| *of != slot);
        if let Some(Made::Rows { array, rows, .. }) = self.tensors.made[slot].take() {
            self.lane.give_back(rows, array);
        }
    }

    /// A tensor that was asked for, rounded to what `precision` says; `last`: it is not needed again.
    pub(super) fn output(
        &mut self,
        slot: usize,
        last: bool,
        precision: CarryPrecision,
    ) -> Result<Carried, ExecError> {
        if last
            && precision == CarryPrecision::F32
            && let Some(made) = self.tensors.made[slot].take()
        {
            return match made {
                Made::Rows { array, rows, width } => {
                    Ok(matrix(rows, width, self.lane.taken(array, rows * width)?))
                }
                Made::Lengths(lengths) => Ok(vector(lengths)),
            };
        }
        match (&self.tensors.made[slot], self.tensors.given[slot]) {
            (Some(Made::Rows { array, rows, width }), _) => match precision {
                CarryPrecision::F32 => {
                    Ok(matrix(*rows, *width, self.lane.copied(array.borrow(), rows * width)?))
                }
                CarryPrecision::Bf16 => {
                    let dims = vec![*rows, *width];
                    if let Some(halves) = self.lane.stay(array.borrow(), rows * width)? {
                        return Ok(Carried::OnDevice(OnDevice { dims, values: Arc::new(halves) }));
                    }
                    let halves = self.lane.copied_halves(array.borrow(), rows * width)?;
                    Ok(Carried::halves(dims, halves))
                }
            },
            (Some(Made::Lengths(lengths)), _) => Ok(vector(lengths.clone())),
            (None, Some(Input::Halves(halves))) => Ok(Carried::Halves(halves.clone())),
            (None, Some(Input::OnDevice(there))) => Ok(Carried::OnDevice(there.clone())),
            (None, Some(Input::Tensor(tensor))) => Ok(Carried::Whole(Arc::new(tensor.clone()))),
            (None, None) => Err(self.tensors.missing(slot)),
        }
    }

    /// Memory for a step's output; its content is not said.
    fn array(
        &mut self,
        step: &Step,
        rows: usize,
        width: usize,
    ) -> Result<<P::Lane as Lane>::Owned, ExecError> {
        let len = rows.checked_mul(width).filter(|len| *len <= isize::MAX as usize / size_of::<f32>());
        let name = &self.session.slots[step.writes[0]].name;
        let len =
            len.ok_or_else(|| wrong(name, "a size that memory can hold", format!("{rows} rows of {width}")))?;
        Ok(self.lane.array(len)?)
    }

    /// Writes a step's output, `shape`: its rows and width.
    fn compute(
        &mut self,
        step: &Step,
        shape: (usize, usize),
        out: &mut <P::Lane as Lane>::Array,
    ) -> Result<(), ExecError> {
        let (rows, width) = shape;
        let len = rows * width;
        match &step.op {
            // Not here: it has two outputs.
            Ready::Embed { .. } => {}
            Ready::Attend { attend, rotation } => return self.attend(step, attend, *rotation, out),
            Ready::Select(select) => {
                let x = self.tensors.of(step, 0)?.0;
                let choice = choice(&self.choices, step.reads[1], select.all_tokens)?;
                self.lane.select(choice, select.expert, width, x, out)?;
            }
            Ready::Combine { all_tokens } => return self.combine(step, *all_tokens, width, out),
            Ready::Rms { weight, epsilon, width } => {
                let (x, weight) = (self.tensors.of(step, 0)?.0, self.session.weight(*weight, self.device)?);
                self.lane.rms_norm((len / width, *width), *epsilon, x, weight, out)?;
            }
            Ready::Layer { weight, bias, epsilon, width } => {
                let weight = self.session.weight(*weight, self.device)?;
                let weights = (weight, self.session.weight(*bias, self.device)?);
                let x = self.tensors.of(step, 0)?.0;
                self.lane.layer_norm((len / width, *width), *epsilon, x, weights, out)?;
            }
            Ready::Linear(Matrix { weight, turned, bias, rows: outputs, cols }) => {
                let bias = bias.map(|bias| self.session.weight(bias, self.device)).transpose()?;
                let weight = self.session.factor(*weight, self.device)?;
                let linear = Linear { weight, turned: *turned, bias, rows: *outputs, cols: *cols };
                self.lane.linear(rows, linear, self.tensors.of(step, 0)?.0, out)?;
            }
            Ready::Gate(f) => self.gate(step, *f, shape, out)?,
            Ready::Activate(f) => self.lane.activate(*f, shape, self.tensors.of(step, 0)?.0, out)?,
            Ready::Add => {
                let (a, b) = (self.tensors.of(step, 0)?.0, self.tensors.second(step, rows)?.0);
                self.lane.add(len, a, b, out)?;
            }
            Ready::Softcap(cap) => self.lane.softcap(len, *cap, self.tensors.of(step, 0)?.0, out)?,
            Ready::Route(Route { top_k, normalise, .. }) => {
                self.lane.route(shape, (*top_k, *normalise), self.tensors.of(step, 0)?.0, out)?;
            }
        }
        Ok(())
    }

    fn embed(
        &mut self,
        step: &Step,
        weight: Weights,
        scale: f32,
        positions: Option<&Learned>,
        width: usize,
    ) -> Result<(), ExecError> {
        let tokens = self.tensors.given[step.reads[0]].and_then(Input::tensor);
        let tokens = tokens.ok_or_else(|| self.tensors.missing(step.reads[0]))?;
        let lengths = lengths_of(tokens, self.session.vocabulary)?;
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        if let Some(learned) = positions.filter(|learned| longest > learned.count) {
            let expected = format!("sequences of at most {} positions", learned.count);
            return Err(wrong(TOKENS, expected, format!("one of {longest}")));
        }
        let offset = positions.map_or(0, |learned| learned.offset);
        let (ids, places) = ids_and_places(tokens, &lengths, offset);
        let mut array = self.array(step, ids.len(), width)?;
        let learned = match positions {
            Some(learned) => Some((self.session.weight(learned.weight, self.device)?, places.as_slice())),
            None => None,
        };
        let weight = self.session.weight(weight, self.device)?;
        let embedding = Embedding { weight, width, scale, ids: &ids, learned };
        self.lane.embed(embedding, array.borrow_mut())?;
        self.tensors.keep(step.writes[0], Made::Rows { array, rows: ids.len(), width });
        self.tensors.keep(step.writes[1], Made::Lengths(lengths));
        Ok(())
    }

    fn attend(
        &mut self,
        step: &Step,
        attend: &Attend,
        rotation: usize,
        out: &mut <P::Lane as Lane>::Array,
    ) -> Result<(), ExecError> {
        let slot = step.reads[step.reads.len() - 1];
        if !matches!(&self.sequences, Some((of, ..)) if *of == slot) {
            let lengths = self.tensors.lengths(slot)?;
            let sequences = self.lane.sequences(&lengths)?;
            self.sequences = Some((slot, lengths, sequences));
        }
        let Some((_, lengths, sequences)) = &self.sequences else { return Err(self.tensors.missing(slot)) };
        if lengths.iter().sum::<usize>() != self.tensors.of(step, 0)?.1 {
            return Err(ExecError::Internal(format!(
                "decoder: lengths of `{}` do not fit its rows",
                step.name
            )));
        }
        let tables = match attend.rotary {
            Some(_) => self.session.tables(self.device, rotation, lengths)?,
            None => Vec::new(),
        };
        let turns: Vec<Turn<'_, TableOf<P>>> = tables
            .iter()
            .map(|(sequences, table)| Turn { sequences: sequences.clone(), table: table.as_ref() })
            .collect();
        let Attend { heads, kv_heads, head_dim, scale, softcap, window, .. } = *attend;
        let qkv = qkv(&self.tensors, step, heads * head_dim, kv_heads * head_dim)?;
        let heads = Heads { heads, kv_heads, head_dim, scale, softcap, window };
        Ok(self.lane.attend(&heads, &turns, sequences, qkv, out)?)
    }

    fn gate(
        &mut self,
        step: &Step,
        f: Activation,
        shape: (usize, usize),
        out: &mut <P::Lane as Lane>::Array,
    ) -> Result<(), ExecError> {
        let (array, _, stride) = self.tensors.of(step, 0)?;
        let gate = Strided { array, offset: 0, stride };
        let up = match step.reads.len() {
            1 => Strided { offset: shape.1, ..gate },
            _ => Strided { array: self.tensors.second(step, shape.0)?.0, ..gate },
        };
        Ok(self.lane.gate(f, shape, gate, up, out)?)
    }

    /// Finds which tokens the experts of these weights have, once.
    fn choose(&mut self, weights: usize, all_tokens: bool) -> Result<(), ExecError> {
        if choice(&self.choices, weights, all_tokens).is_err() {
            let (array, tokens, experts) = self.tensors.rows(weights)?;
            let chosen = self.lane.choose((tokens, experts), all_tokens, array)?;
            self.choices.push((weights, all_tokens, chosen));
        }
        Ok(())
    }

    fn select_rows(&mut self, step: &Step, select: &Select) -> Result<usize, ExecError> {
        self.choose(step.reads[1], select.all_tokens)?;
        let choice = choice(&self.choices, step.reads[1], select.all_tokens)?;
        Ok(P::Lane::chosen(choice, select.expert))
    }

    fn combine(
        &mut self,
        step: &Step,
        all_tokens: bool,
        width: usize,
        out: &mut <P::Lane as Lane>::Array,
    ) -> Result<(), ExecError> {
        self.choose(step.reads[0], all_tokens)?;
        let choice = choice(&self.choices, step.reads[0], all_tokens)?;
        let (weights, _, experts) = self.tensors.of(step, 0)?;
        let mut x = Vec::with_capacity(experts);
        for expert in 0..experts {
            let (array, rows, _) = self.tensors.of(step, 1 + expert)?;
            let expected = P::Lane::chosen(choice, expert);
            if rows != expected {
                let name = &self.session.slots[step.reads[1 + expert]].name;
                return Err(wrong(name, format!("{expected} rows, one per token"), format!("{rows}")));
            }
            x.push(array);
        }
        Ok(self.lane.combine(choice, width, weights, &x, out)?)
    }
}

/// Sequences that turn alike, and their table.
type RunTable<P> = (Range<usize>, Arc<TableOf<P>>);

impl<P: Place> DecoderSession<P> {
    /// Rotary tables of a batch: runs of sequences that turn alike, and the table of each.
    fn tables(
        &self,
        device: usize,
        rotation: usize,
        lengths: &[usize],
    ) -> Result<Vec<RunTable<P>>, ExecError> {
        let gone = || ExecError::Internal(format!("decoder: no rotation {rotation} on device {device}"));
        let rotary = self.rotations.get(rotation).ok_or_else(gone)?;
        let tables = self.tables.get(device).ok_or_else(gone)?;
        let (mut found, mut start) = (Vec::new(), 0);
        for run in lengths.chunk_by(|a, b| alike(rotary, *a, *b)) {
            let longest = run.iter().copied().max().unwrap_or(0);
            let make = |frequencies: &[f32], factor, positions| {
                self.place.table(device, frequencies, factor, positions)
            };
            let table = tables.get(rotation, rotary, longest, make)?;
            found.push((start..start + run.len(), table));
            start += run.len();
        }
        Ok(found)
    }
}

/// Queries, keys and values: side by side in one tensor, or three.
fn qkv<'t, L: Lane>(
    tensors: &'t Tensors<'_, L>,
    step: &Step,
    q_width: usize,
    kv_width: usize,
) -> Result<[Strided<'t, L::Array>; 3], ExecError> {
    if step.reads.len() == 2 {
        let (array, _, stride) = tensors.of(step, 0)?;
        return Ok([0, q_width, q_width + kv_width].map(|offset| Strided { array, offset, stride }));
    }
    let of = |input| tensors.of(step, input).map(|(array, _, stride)| Strided { array, offset: 0, stride });
    Ok([of(0)?, of(1)?, of(2)?])
}

fn choice<T>(choices: &[(usize, bool, T)], weights: usize, all_tokens: bool) -> Result<&T, ExecError> {
    let found = choices.iter().find(|(of, all, _)| (*of, *all) == (weights, all_tokens));
    found
        .map(|(.., choice)| choice)
        .ok_or_else(|| ExecError::Internal("decoder: no choice of experts".into()))
}

/// Ids of all tokens, and the row of each among learned positions; ids have been checked.
fn ids_and_places(tokens: &Tensor, lengths: &[i64], offset: usize) -> (Vec<u32>, Vec<u32>) {
    let longest_stored = tokens.shape.get(1).copied().unwrap_or(0).max(1);
    let ids = tokens.as_i64().unwrap_or_default().chunks_exact(longest_stored);
    let rows = ids.zip(lengths).flat_map(|(ids, length)| ids[..*length as usize].iter().enumerate());
    rows.map(|(position, id)| (*id as u32, (offset + position) as u32)).unzip()
}

fn matrix(rows: usize, width: usize, values: Vec<f32>) -> Carried {
    Carried::Whole(Arc::new(Tensor { shape: vec![rows, width], data: Data::F32(values) }))
}

fn vector(values: Vec<i64>) -> Carried {
    Carried::Whole(Arc::new(Tensor { shape: vec![values.len()], data: Data::I64(values) }))
}
