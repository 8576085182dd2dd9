//! What each operator computes, tensor by tensor.
//!
//! Not here: kernels (`compute::cpu`), when an operator runs (`session`).

use super::check::{lengths_of, wrong};
use super::kinds::Kind;
use super::scratch::Scratch;
use super::session::DecoderSession;
use super::step::{Learned, Matrix, Ready, Step};
use crate::ExecError;
use halfstep_compute::cpu::product::{Stored, multiply};
use halfstep_compute::cpu::{self, Attention, Rows};
use halfstep_compute::{Activation, Product};
use halfstep_model::decoder::{Attend, Route, Select, TOKENS};
use halfstep_model::{Data, Tensor};

/// The tensors of one run.
pub(super) struct Run<'a> {
    session: &'a DecoderSession,
    given: Vec<Option<&'a Tensor>>,
    made: Vec<Option<Tensor>>,
    scratch: &'a mut Scratch,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        session: &'a DecoderSession,
        given: Vec<Option<&'a Tensor>>,
        scratch: &'a mut Scratch,
    ) -> Self {
        let made = given.iter().map(|_| None).collect();
        Self { session, given, made, scratch }
    }

    /// Runs a step; what it writes is kept unless it was given.
    pub(super) fn execute(&mut self, index: usize) -> Result<&'a Step, ExecError> {
        let step = &self.session.steps[index];
        let outputs = self.compute(step)?;
        for (slot, tensor) in step.writes.iter().zip(outputs) {
            if self.given[*slot].is_none() {
                self.made[*slot] = Some(tensor);
            }
        }
        Ok(step)
    }

    /// Drops a tensor that nothing reads any more.
    pub(super) fn forget(&mut self, slot: usize) {
        if let Some(Tensor { shape, data: Data::F32(buffer) }) = self.made[slot].take() {
            self.scratch.give(shape[0], buffer);
        }
    }

    /// A tensor that was asked for; `last`: it is not needed again.
    pub(super) fn output(&mut self, slot: usize, last: bool) -> Result<Tensor, ExecError> {
        if last && let Some(tensor) = self.made[slot].take() {
            return Ok(tensor);
        }
        self.tensor(slot).cloned()
    }

    fn tensor(&self, slot: usize) -> Result<&Tensor, ExecError> {
        let tensor = self.made[slot].as_ref().or(self.given[slot]);
        tensor.ok_or_else(|| ExecError::Missing { name: self.session.slots[slot].name.clone() })
    }

    /// The numbers of a step's input, how many rows they are, and how wide.
    fn rows(&self, step: &Step, input: usize) -> Result<(&[f32], usize, usize), ExecError> {
        let tensor = self.tensor(step.reads[input])?;
        match (tensor.as_f32(), tensor.shape.as_slice()) {
            (Some(data), [rows, width]) => Ok((data, *rows, *width)),
            _ => Err(ExecError::Internal(format!("decoder: input {input} of `{}` is not f32", step.name))),
        }
    }

    /// The numbers of a second input that must have as many rows as the first.
    fn second(&self, step: &Step, rows: usize) -> Result<&[f32], ExecError> {
        match self.rows(step, 1)? {
            (data, found, _) if found == rows => Ok(data),
            (_, found, _) => {
                let name = &self.session.slots[step.reads[1]].name;
                Err(wrong(name, format!("{rows} rows, as the other input has"), format!("{found}")))
            }
        }
    }

    fn lengths(&self, step: &Step, input: usize) -> Result<&[i64], ExecError> {
        let lengths = self.tensor(step.reads[input])?.as_i64();
        lengths.ok_or_else(|| ExecError::Internal(format!("decoder: `{}` lacks its lengths", step.name)))
    }

    /// Width of a step's output.
    fn width(&self, step: &Step) -> usize {
        match self.session.slots[step.writes[0]].kind {
            Kind::Rows { width, .. } => width,
            _ => 0,
        }
    }

    fn compute(&mut self, step: &Step) -> Result<Vec<Tensor>, ExecError> {
        if let Ready::Embed { weight, scale, positions, width } = &step.op {
            return self.embed(step, weight, *scale, positions.as_ref(), *width);
        }
        let rows = match &step.op {
            Ready::Select(select) => self.select_rows(step, select)?,
            _ => self.rows(step, 0)?.1,
        };
        let width = self.width(step);
        let mut out = self.buffer(step, rows, width)?;
        match &step.op {
            // Done above: it has two outputs.
            Ready::Embed { .. } => {}
            Ready::Rms { weight, epsilon } => {
                cpu::rms_norm(self.rows(step, 0)?.0, weight, *epsilon, &mut out)
            }
            Ready::Layer { weight, bias, epsilon } => {
                cpu::layer_norm(self.rows(step, 0)?.0, weight, bias, *epsilon, &mut out);
            }
            Ready::Linear(matrix) => linear(self.rows(step, 0)?.0, matrix, &mut out),
            Ready::Attend { attend, rotation } => self.attend(step, attend, *rotation, &mut out)?,
            Ready::Gate(f) => self.gate(step, *f, width, &mut out)?,
            Ready::Activate(f) => {
                out.copy_from_slice(self.rows(step, 0)?.0);
                f.apply(&mut out);
            }
            Ready::Add => {
                let (a, b) = (self.rows(step, 0)?.0, self.second(step, rows)?);
                for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                    *out = a + b;
                }
            }
            Ready::Softcap(cap) => {
                out.copy_from_slice(self.rows(step, 0)?.0);
                cpu::softcap(*cap, &mut out);
            }
            Ready::Route(Route { experts, top_k, normalise }) => {
                cpu::route(self.rows(step, 0)?.0, *experts, *top_k, *normalise, &mut out);
            }
            Ready::Select(select) => {
                let ((x, _, width), (weights, _, experts)) = (self.rows(step, 0)?, self.rows(step, 1)?);
                let chosen = cpu::chosen(weights, experts, select.expert, select.all_tokens);
                cpu::gather(x, width, chosen, &mut out);
            }
            Ready::Combine { all_tokens } => self.combine(step, *all_tokens, width, &mut out)?,
        }
        Ok(vec![Tensor { shape: vec![rows, width], data: Data::F32(out) }])
    }

    /// Memory for a step's output; its content is not said.
    fn buffer(&mut self, step: &Step, rows: usize, width: usize) -> Result<Vec<f32>, ExecError> {
        let len = rows.checked_mul(width).filter(|len| *len <= isize::MAX as usize / size_of::<f32>());
        let name = &self.session.slots[step.writes[0]].name;
        let len =
            len.ok_or_else(|| wrong(name, "a size that memory can hold", format!("{rows} rows of {width}")))?;
        Ok(self.scratch.take(len))
    }

    fn embed(
        &mut self,
        step: &Step,
        weight: &[f32],
        scale: f32,
        positions: Option<&Learned>,
        width: usize,
    ) -> Result<Vec<Tensor>, ExecError> {
        let lengths = lengths_of(self.tensor(step.reads[0])?, self.session.vocabulary)?;
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        if let Some(learned) = positions.filter(|learned| longest > learned.count) {
            let expected = format!("sequences of at most {} positions", learned.count);
            return Err(wrong(TOKENS, expected, format!("one of {longest}")));
        }
        let rows = lengths.iter().map(|length| *length as usize).sum();
        let mut out = self.buffer(step, rows, width)?;
        let tokens = self.tensor(step.reads[0])?;
        let longest_stored = tokens.shape.get(1).copied().unwrap_or(0).max(1);
        let ids = tokens.as_i64().unwrap_or_default().chunks_exact(longest_stored);
        let places = ids.zip(&lengths).flat_map(|(ids, length)| ids[..*length as usize].iter().enumerate());
        for (out, (position, id)) in out.chunks_exact_mut(width).zip(places) {
            let row = &weight[*id as usize * width..][..width];
            let learned = positions.map(|p| &p.weight[(p.offset + position) * width..][..width]);
            embed_row(row, scale, learned, out);
        }
        let x = Tensor { shape: vec![rows, width], data: Data::F32(out) };
        Ok(vec![x, Tensor { shape: vec![lengths.len()], data: Data::I64(lengths) }])
    }

    fn attend(
        &mut self,
        step: &Step,
        attend: &Attend,
        rotation: usize,
        out: &mut [f32],
    ) -> Result<(), ExecError> {
        let mut scratch = std::mem::take(self.scratch);
        let result = self.attend_with(step, attend, rotation, &mut scratch, out);
        *self.scratch = scratch;
        result
    }

    fn attend_with(
        &self,
        step: &Step,
        attend: &Attend,
        rotation: usize,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<(), ExecError> {
        let (q_width, kv_width) = (attend.heads * attend.head_dim, attend.kv_heads * attend.head_dim);
        let [q, k, v] = match step.reads.len() {
            2 => {
                let (x, _, stride) = self.rows(step, 0)?;
                [0, q_width, q_width + kv_width]
                    .map(|at| Rows { data: x.get(at..).unwrap_or_default(), stride })
            }
            _ => {
                let of = |input| self.rows(step, input).map(|(data, _, stride)| Rows { data, stride });
                [of(0)?, of(1)?, of(2)?]
            }
        };
        let lengths = self.lengths(step, step.reads.len() - 1)?;
        if lengths.iter().sum::<i64>() as usize * q_width != out.len() {
            return Err(ExecError::Internal(format!(
                "decoder: lengths of `{}` do not fit its rows",
                step.name
            )));
        }
        let mut start = 0;
        for length in lengths.iter().map(|length| *length as usize) {
            let rotary = self.session.rotations.get(rotation).filter(|_| attend.rotary.is_some());
            let attention = Attention {
                heads: attend.heads,
                kv_heads: attend.kv_heads,
                head_dim: attend.head_dim,
                scale: attend.scale,
                softcap: attend.softcap,
                window: attend.window,
                rotary: rotary.map(|rotary| scratch.tables.get(rotation, rotary, length)),
            };
            let out = &mut out[start * q_width..][..length * q_width];
            cpu::attend(
                &attention,
                after(q, start),
                after(k, start),
                after(v, start),
                length,
                &mut scratch.attention,
                out,
            );
            start += length;
        }
        Ok(())
    }

    fn gate(&self, step: &Step, f: Activation, width: usize, out: &mut [f32]) -> Result<(), ExecError> {
        if out.is_empty() {
            return Ok(());
        }
        let (first, _, stride) = self.rows(step, 0)?;
        let up = match step.reads.len() {
            1 => Rows { data: &first[width..], stride },
            _ => Rows { data: self.second(step, out.len() / width)?, stride },
        };
        cpu::gate(f, Rows { data: first, stride }, up, width, out);
        Ok(())
    }

    fn select_rows(&self, step: &Step, select: &Select) -> Result<usize, ExecError> {
        let (weights, _, experts) = self.rows(step, 1)?;
        Ok(cpu::chosen(weights, experts, select.expert, select.all_tokens).count())
    }

    fn combine(&self, step: &Step, all_tokens: bool, width: usize, out: &mut [f32]) -> Result<(), ExecError> {
        let (weights, _, experts) = self.rows(step, 0)?;
        out.fill(0.0);
        for expert in 0..experts {
            let (x, rows, _) = self.rows(step, 1 + expert)?;
            let expected = cpu::chosen(weights, experts, expert, all_tokens).count();
            if rows != expected {
                let name = &self.session.slots[step.reads[1 + expert]].name;
                return Err(wrong(name, format!("{expected} rows, one per token"), format!("{rows}")));
            }
            cpu::combine(weights, experts, expert, all_tokens, x, width, out);
        }
        Ok(())
    }
}

/// Rows without the first `skipped`.
fn after(rows: Rows<'_>, skipped: usize) -> Rows<'_> {
    Rows { data: &rows.data[skipped * rows.stride..], ..rows }
}

fn embed_row(row: &[f32], scale: f32, learned: Option<&[f32]>, out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(row) {
        *out = x * scale;
    }
    for (out, x) in out.iter_mut().zip(learned.unwrap_or_default()) {
        *out += x;
    }
}

/// `out = x * weight + bias`; `x`: `[_, cols]`, `out`: `[_, rows]`.
fn linear(x: &[f32], matrix: &Matrix, out: &mut [f32]) {
    let Matrix { ref weight, ref bias, rows, cols } = *matrix;
    if let Some(bias) = bias {
        out.chunks_exact_mut(rows).for_each(|out| out.copy_from_slice(bias));
    }
    let beta = if bias.is_some() { 1.0 } else { 0.0 };
    let product = Product { beta, ..Product::new(out.len() / rows, rows, cols) };
    let stored = |data, stride| Stored { data, stride, transposed: false };
    multiply(product, stored(x, cols), stored(weight, rows), out, rows);
}
