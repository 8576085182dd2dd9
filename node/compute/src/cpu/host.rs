//! Decoders on the CPU: the plain functions of this folder behind the operators' interface.
//!
//! A lane is the memory of one run, kept for the next. Not here: the functions.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use super::product::{Stored, multiply};
use super::{Attention, AttentionScratch, RotaryTable, Rows};
use crate::activation::Activation;
use crate::cpu;
use crate::cuda::CudaHalves;
use crate::decoder::{Embedding, Heads, Lane, Linear, Place, Strided, Turn};
use crate::device::{DeviceError, Product};
use crate::shape::row;

/// The CPU as a place for decoders.
#[derive(Debug, Default)]
pub struct Host {
    /// Memory of runs that are over.
    idle: Mutex<Vec<HostLane>>,
}

/// Memory of one run at a time.
#[derive(Debug, Default)]
pub struct HostLane {
    attention: AttentionScratch,
    /// Free buffers of `tokens` rows each.
    free: Vec<Vec<f32>>,
    tokens: Option<usize>,
}

/// The tokens of each expert.
#[derive(Debug)]
pub struct HostChoice {
    all_tokens: bool,
    tokens: Vec<Vec<usize>>,
}

impl Place for Host {
    type Lane = HostLane;

    fn devices(&self) -> usize {
        1
    }

    /// By up to a fifth.
    fn wants_turned_weights(&self) -> bool {
        true
    }

    fn keep(&self, values: Vec<f32>) -> Result<Vec<Vec<f32>>, DeviceError> {
        Ok(vec![values])
    }

    fn keep_factor(&self, values: Vec<f32>, _halves: bool) -> Result<Vec<Vec<f32>>, DeviceError> {
        Ok(vec![values])
    }

    fn table(
        &self,
        _device: usize,
        frequencies: &[f32],
        factor: f32,
        positions: usize,
    ) -> Result<RotaryTable, DeviceError> {
        Ok(RotaryTable::new(frequencies, factor, positions))
    }

    fn with<T, E: From<DeviceError>>(
        &self,
        work: impl FnOnce(usize, &mut HostLane) -> Result<T, E>,
    ) -> Result<T, E> {
        // A list is whole at every step.
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lane = idle().pop().unwrap_or_default();
        let result = work(0, &mut lane);
        idle().push(lane);
        result
    }
}

/// Rows of a whole matrix or of some of its columns.
fn rows<'a>(from: Strided<'a, [f32]>) -> Rows<'a> {
    Rows { data: from.array.get(from.offset..).unwrap_or_default(), stride: from.stride }
}

/// Rows without the first `skipped`.
fn after(rows: Rows<'_>, skipped: usize) -> Rows<'_> {
    Rows { data: rows.data.get(skipped * rows.stride..).unwrap_or_default(), ..rows }
}

impl Lane for HostLane {
    type Array = [f32];
    type Given<'a> = Cow<'a, [f32]>;
    type Owned = Vec<f32>;
    type Weights = Vec<f32>;
    type Factor = Vec<f32>;
    type Table = RotaryTable;
    type Sequences = Vec<usize>;
    type Choice = HostChoice;

    fn begin(&mut self, tokens: Option<usize>) {
        if self.tokens != tokens {
            self.free.clear();
        }
        self.tokens = tokens;
    }

    fn finish(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn given<'a>(&mut self, host: &'a [f32]) -> Result<Cow<'a, [f32]>, DeviceError> {
        Ok(Cow::Borrowed(host))
    }

    fn given_halves<'a>(&mut self, host: &'a [u16]) -> Result<Cow<'a, [f32]>, DeviceError> {
        Ok(Cow::Owned(cpu::widen(host)))
    }

    fn given_staying<'a>(&mut self, halves: &'a CudaHalves) -> Result<Cow<'a, [f32]>, DeviceError> {
        Ok(Cow::Owned(cpu::widen(&halves.download()?)))
    }

    fn array(&mut self, len: usize) -> Result<Vec<f32>, DeviceError> {
        let fitting = self.free.iter().position(|buffer| buffer.len() == len);
        Ok(fitting.map_or_else(|| vec![0.0; len], |index| self.free.swap_remove(index)))
    }

    fn give_back(&mut self, rows: usize, array: Vec<f32>) {
        if Some(rows) == self.tokens {
            self.free.push(array);
        }
    }

    fn copied(&mut self, array: &[f32], _len: usize) -> Result<Vec<f32>, DeviceError> {
        Ok(array.to_vec())
    }

    fn copied_halves(&mut self, array: &[f32], _len: usize) -> Result<Vec<u16>, DeviceError> {
        Ok(cpu::narrow(array))
    }

    fn taken(&mut self, array: Vec<f32>, _len: usize) -> Result<Vec<f32>, DeviceError> {
        Ok(array)
    }

    fn embed(&mut self, embedding: Embedding<'_, [f32]>, out: &mut [f32]) -> Result<(), DeviceError> {
        let Embedding { weight, width, scale, ids, learned } = embedding;
        let of = |operand, table: &'_ [f32], id: u32| {
            row(operand, id, table.len() / width.max(1)).map(|row| row * width)
        };
        for (token, (out, id)) in out.chunks_exact_mut(width).zip(ids).enumerate() {
            let start = of("embedding", weight, *id)?;
            for (out, x) in out.iter_mut().zip(&weight[start..start + width]) {
                *out = x * scale;
            }
            let Some((table, place)) = learned.and_then(|(table, places)| Some((table, places.get(token)?)))
            else {
                continue;
            };
            let start = of("learned positions", table, *place)?;
            for (out, x) in out.iter_mut().zip(&table[start..start + width]) {
                *out += x;
            }
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        _runs: (usize, usize),
        epsilon: f32,
        x: &[f32],
        weight: &[f32],
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        cpu::rms_norm(x, weight, epsilon, out);
        Ok(())
    }

    fn layer_norm(
        &mut self,
        _runs: (usize, usize),
        epsilon: f32,
        x: &[f32],
        (weight, bias): (&[f32], &[f32]),
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        cpu::layer_norm(x, weight, bias, epsilon, out);
        Ok(())
    }

    fn linear(
        &mut self,
        tokens: usize,
        linear: Linear<'_, [f32], Vec<f32>>,
        x: &[f32],
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let Linear { weight, turned, bias, rows, cols } = linear;
        if let Some(bias) = bias {
            out.chunks_exact_mut(rows).for_each(|out| out.copy_from_slice(bias));
        }
        let beta = if bias.is_some() { 1.0 } else { 0.0 };
        let product = Product { beta, ..Product::new(tokens, rows, cols) };
        let x = Stored { data: x, stride: cols, transposed: false };
        let weight = Stored { data: weight, stride: if turned { rows } else { cols }, transposed: !turned };
        multiply(product, x, weight, out, rows);
        Ok(())
    }

    fn sequences(&mut self, lengths: &[usize]) -> Result<Vec<usize>, DeviceError> {
        Ok(lengths.to_vec())
    }

    fn attend(
        &mut self,
        heads: &Heads,
        turns: &[Turn<'_, RotaryTable>],
        sequences: &Vec<usize>,
        qkv: [Strided<'_, [f32]>; 3],
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let Heads { heads, kv_heads, head_dim, scale, softcap, window } = *heads;
        let [q, k, v] = qkv.map(rows);
        let (width, mut start) = (heads * head_dim, 0);
        for (sequence, length) in sequences.iter().enumerate() {
            let rotary = turns.iter().find(|turn| turn.sequences.contains(&sequence)).map(|turn| turn.table);
            let attention = Attention { heads, kv_heads, head_dim, scale, softcap, window, rotary };
            let out = &mut out[start * width..][..length * width];
            let [q, k, v] = [q, k, v].map(|all| after(all, start));
            cpu::attend(&attention, q, k, v, *length, &mut self.attention, out);
            start += length;
        }
        Ok(())
    }

    fn gate(
        &mut self,
        f: Activation,
        (_, width): (usize, usize),
        gate: Strided<'_, [f32]>,
        up: Strided<'_, [f32]>,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        if !out.is_empty() {
            cpu::gate(f, rows(gate), rows(up), width, out);
        }
        Ok(())
    }

    fn activate(
        &mut self,
        f: Activation,
        _shape: (usize, usize),
        x: &[f32],
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        out.copy_from_slice(x);
        f.apply(out);
        Ok(())
    }

    fn add(&mut self, _len: usize, a: &[f32], b: &[f32], out: &mut [f32]) -> Result<(), DeviceError> {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = a + b;
        }
        Ok(())
    }

    fn softcap(&mut self, _len: usize, cap: f32, x: &[f32], out: &mut [f32]) -> Result<(), DeviceError> {
        out.copy_from_slice(x);
        cpu::softcap(cap, out);
        Ok(())
    }

    fn route(
        &mut self,
        (_, experts): (usize, usize),
        (top_k, normalise): (usize, bool),
        logits: &[f32],
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        cpu::route(logits, experts, top_k, normalise, out);
        Ok(())
    }

    fn choose(
        &mut self,
        (_, experts): (usize, usize),
        all_tokens: bool,
        weights: &[f32],
    ) -> Result<HostChoice, DeviceError> {
        let of = |expert| cpu::chosen(weights, experts, expert, all_tokens).collect();
        Ok(HostChoice { all_tokens, tokens: (0..experts).map(of).collect() })
    }

    fn chosen(choice: &HostChoice, expert: usize) -> usize {
        choice.tokens.get(expert).map_or(0, Vec::len)
    }

    fn select(
        &mut self,
        choice: &HostChoice,
        expert: usize,
        width: usize,
        x: &[f32],
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let tokens = choice.tokens.get(expert).map(Vec::as_slice).unwrap_or_default();
        cpu::gather(x, width, tokens.iter().copied(), out);
        Ok(())
    }

    fn combine(
        &mut self,
        choice: &HostChoice,
        width: usize,
        weights: &[f32],
        x: &[&[f32]],
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        out.fill(0.0);
        for (expert, x) in x.iter().enumerate() {
            cpu::combine(weights, choice.tokens.len(), expert, choice.all_tokens, x, width, out);
        }
        Ok(())
    }
}
