//! Causal attention of one sequence, with grouped queries, by blocks of query rows.
//!
//! The queries of a block that share a key head are one matrix: their scores against the keys they may see are one
//! product, the weighted sum of values another. A block's scores are all that is ever held, and keys before its first
//! window are not read.
//! Not here: projections, batches (`exec`).
#![expect(unsafe_code, reason = "calls functions compiled for an instruction-set level found at run time")]

use super::gate::Rows;
use super::isa::isa;
use super::lanes::LANES;
use super::level::leveled;
use super::math::{exp_split, tanh};
use super::product::{Stored, multiply};
use super::rotary::RotaryTable;
use crate::Product;

/// Rows of queries (positions times the heads that share a key head) whose scores are held at once.
const BLOCK: usize = 64;

/// What is computed.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`. Query head `h` reads key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` before the softmax.
    pub softcap: Option<f32>,
    /// Position `t` sees `t - window + 1 ..= t`; all before it where absent.
    pub window: Option<usize>,
    /// Rotation of queries and keys.
    pub rotary: Option<&'a RotaryTable>,
}

/// Memory of [`attend`], kept from call to call.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    keys: Vec<f32>,
    queries: Vec<f32>,
    scores: Vec<f32>,
    sums: Vec<f32>,
    mixed: Vec<f32>,
}

/// Queries whose scores are computed together, and the keys they see.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// First position.
    start: usize,
    /// Positions.
    positions: usize,
    /// Query heads per key head.
    group: usize,
    /// First key that any of them sees.
    first_key: usize,
    /// Keys from there to the last position.
    keys: usize,
    window: usize,
}

impl Block {
    fn new(attention: &Attention<'_>, start: usize, length: usize) -> Self {
        let group = attention.heads / attention.kv_heads;
        let positions = positions_per_block(group).min(length - start);
        let window = attention.window.unwrap_or(usize::MAX);
        let first_key = (start + 1).saturating_sub(window);
        Self { start, positions, group, first_key, keys: start + positions - first_key, window }
    }

    fn rows(&self) -> usize {
        self.positions * self.group
    }

    /// Columns of the scores that a row's query sees.
    fn seen(&self, row: usize) -> std::ops::Range<usize> {
        let end = self.start + row / self.group + 1;
        end.saturating_sub(self.window).max(self.first_key) - self.first_key..end - self.first_key
    }
}

fn positions_per_block(group: usize) -> usize {
    (BLOCK / group).max(1)
}

/// Attention of one sequence of `length` positions from 0.
///
/// `q`: `[length, heads * head_dim]`; `k`, `v`: `[length, kv_heads * head_dim]`; `out` as `q`, without gaps. A row of
/// scores that is not finite becomes NaN.
///
/// # Panics
/// If an operand does not hold its shape, `heads` is not a positive multiple of `kv_heads`, a window is 0 or the
/// rotary table is shorter than the sequence.
pub fn attend(
    attention: &Attention<'_>,
    q: Rows<'_>,
    k: Rows<'_>,
    v: Rows<'_>,
    length: usize,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let Attention { heads, kv_heads, head_dim, window, .. } = *attention;
    assert!(
        kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads) && window != Some(0),
        "attention: {heads} heads on {kv_heads}, window {window:?}"
    );
    assert!(
        heads.checked_mul(head_dim).and_then(|width| width.checked_mul(length)) == Some(out.len()),
        "attention: {} outputs, expected [{length}, {heads} * {head_dim}]",
        out.len()
    );
    scratch.reserve(attention, length);
    for head in 0..kv_heads {
        turn_keys(attention, k, head, length, &mut scratch.keys);
        let v = Rows { data: v.data.get(head * head_dim..).unwrap_or_default(), ..v };
        let step = positions_per_block(heads / kv_heads);
        for start in (0..length).step_by(step) {
            attend_block(attention, Block::new(attention, start, length), head, q, v, scratch, out);
        }
    }
}

impl AttentionScratch {
    fn reserve(&mut self, attention: &Attention<'_>, length: usize) {
        let group = attention.heads / attention.kv_heads;
        let rows = positions_per_block(group).min(length) * group;
        let seen = attention.window.unwrap_or(usize::MAX).saturating_add(positions_per_block(group));
        let sizes = [
            (&mut self.keys, length * attention.head_dim),
            (&mut self.queries, rows * attention.head_dim),
            (&mut self.mixed, rows * attention.head_dim),
            (&mut self.scores, rows * seen.min(length)),
            (&mut self.sums, rows),
        ];
        for (buffer, size) in sizes {
            if buffer.len() < size {
                buffer.resize(size, 0.0);
            }
        }
    }
}

/// One key head, turned, `[length, head_dim]`.
fn turn_keys(attention: &Attention<'_>, k: Rows<'_>, head: usize, length: usize, keys: &mut [f32]) {
    let (width, dim) = (attention.kv_heads * attention.head_dim, attention.head_dim);
    for (position, out) in keys.chunks_exact_mut(dim).enumerate().take(length) {
        turn(attention, position, &k.row(position, width)[head * dim..][..dim], out);
    }
}

fn turn(attention: &Attention<'_>, position: usize, head: &[f32], out: &mut [f32]) {
    match attention.rotary {
        Some(table) => table.turn(position, head, out),
        None => out.copy_from_slice(head),
    }
}

/// The block's queries that share a key head; row `t * group + g`.
fn turn_queries(attention: &Attention<'_>, block: Block, head: usize, q: Rows<'_>, queries: &mut [f32]) {
    let dim = attention.head_dim;
    for (row, out) in queries.chunks_exact_mut(dim).enumerate().take(block.rows()) {
        let (position, member) = (block.start + row / block.group, row % block.group);
        let from = q.row(position, attention.heads * dim);
        turn(attention, position, &from[(head * block.group + member) * dim..][..dim], out);
    }
}

/// `v`: from the key head's first number.
fn attend_block(
    attention: &Attention<'_>,
    block: Block,
    head: usize,
    q: Rows<'_>,
    v: Rows<'_>,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let AttentionScratch { keys, queries, scores, sums, mixed } = scratch;
    let dim = attention.head_dim;
    let stored = |data, stride, transposed| Stored { data, stride, transposed };
    turn_queries(attention, block, head, q, queries);
    let product = Product { alpha: attention.scale, ..Product::new(block.rows(), block.keys, dim) };
    let keys = &keys[block.first_key * dim..];
    multiply(product, stored(queries, dim, false), stored(keys, dim, true), scores, block.keys);
    weights_at(isa(), block, attention.softcap.unwrap_or(0.0), scores, sums);
    let values = stored(&v.data[block.first_key * v.stride..], v.stride, false);
    let product = Product::new(block.rows(), dim, block.keys);
    multiply(product, stored(scores, block.keys, false), values, mixed, dim);
    for (row, mixed) in mixed.chunks_exact(dim).enumerate().take(block.rows()) {
        let (position, member) = (block.start + row / block.group, row % block.group);
        let at = (position * attention.heads + head * block.group + member) * dim;
        let factor = 1.0 / sums[row];
        for (out, mixed) in out[at..at + dim].iter_mut().zip(mixed) {
            *out = mixed * factor;
        }
    }
}

/// Scores become `e^(score - largest)`, 0 where a query does not see; `sums`: of each row.
#[inline(always)]
fn weights<const FUSED: bool>(block: Block, cap: f32, scores: &mut [f32], sums: &mut [f32]) {
    for row in 0..block.rows() {
        let scores = &mut scores[row * block.keys..][..block.keys];
        let seen = block.seen(row);
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        let scores = &mut scores[seen];
        if cap != 0.0 {
            soften::<FUSED>(cap, scores);
        }
        sums[row] = exponentials::<FUSED>(scores);
    }
}

/// In place `e^(x - max x)`; returns their sum.
#[inline(always)]
fn exponentials<const FUSED: bool>(x: &mut [f32]) -> f32 {
    let (largest, finite) = largest(x);
    if !finite {
        x.fill(f32::NAN);
        return 1.0;
    }
    let mut sums = [0.0; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *x = exp_split::<FUSED>(*x - largest);
            *sum += *x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *x = exp_split::<FUSED>(*x - largest);
        *sum += *x;
    }
    sums.iter().sum()
}

/// The largest number, and whether all are finite.
#[inline(always)]
fn largest(x: &[f32]) -> (f32, bool) {
    let mut most = [f32::MIN; LANES];
    // `x * 0` is 0, or NaN if `x` is not finite.
    let mut spoilt = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for ((most, spoilt), x) in most.iter_mut().zip(&mut spoilt).zip(chunk) {
            *most = if *x > *most { *x } else { *most };
            *spoilt += *x * 0.0;
        }
    }
    for ((most, spoilt), x) in most.iter_mut().zip(&mut spoilt).zip(rest) {
        *most = if *x > *most { *x } else { *most };
        *spoilt += *x * 0.0;
    }
    (most.iter().fold(f32::MIN, |a, b| a.max(*b)), spoilt.iter().sum::<f32>() == 0.0)
}

#[inline(always)]
fn soften<const FUSED: bool>(cap: f32, x: &mut [f32]) {
    for x in x {
        *x = cap * tanh::<FUSED>(*x / cap);
    }
}

leveled!(fn weights_at(block: Block, cap: f32, scores: &mut [f32], sums: &mut [f32]) = weights);
leveled!(fn soften_at(cap: f32, x: &mut [f32]) = soften);

/// In place `cap * tanh(x / cap)`.
pub fn softcap(cap: f32, x: &mut [f32]) {
    soften_at(isa(), cap, x);
}

/// In place the softmax of one row. A row that is not finite becomes NaN.
pub(crate) fn softmax(x: &mut [f32]) {
    let sum = exponentials::<false>(x);
    x.iter_mut().for_each(|x| *x /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::available;
    use crate::random::Stream;

    fn uniform(seed: u64, len: usize) -> Vec<f32> {
        let mut stream = Stream::new(seed, 0, 0);
        (0..len).map(|_| stream.unit_f32() * 4.0 - 2.0).collect()
    }

    fn turned(table: Option<&RotaryTable>, position: usize, head: &[f32]) -> Vec<f64> {
        let mut out = head.to_vec();
        if let Some(table) = table {
            table.turn(position, head, &mut out);
        }
        out.into_iter().map(f64::from).collect()
    }

    /// One query of one head, by definition.
    fn expect(a: &Attention<'_>, q: &[f32], k: &[f32], v: &[f32], t: usize, head: usize) -> Vec<f64> {
        let (dim, kv) = (a.head_dim, a.kv_heads * a.head_dim);
        let at = head / (a.heads / a.kv_heads) * dim;
        let query = turned(a.rotary, t, &q[t * a.heads * dim + head * dim..][..dim]);
        let first = a.window.map_or(0, |window| (t + 1).saturating_sub(window));
        let score = |s: usize| {
            let key = turned(a.rotary, s, &k[s * kv + at..][..dim]);
            let score = query.iter().zip(&key).map(|(q, k)| q * k).sum::<f64>() * f64::from(a.scale);
            a.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        };
        let scores: Vec<f64> = (first..=t).map(score).collect();
        let most = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let value = |i: usize| {
            let weighted =
                weights.iter().enumerate().map(|(s, w)| w * f64::from(v[(first + s) * kv + at + i]));
            weighted.sum::<f64>() / sum
        };
        (0..dim).map(value).collect()
    }

    fn check(attention: &Attention<'_>, length: usize) {
        let Attention { heads, kv_heads, head_dim, .. } = *attention;
        let (width, kv) = (heads * head_dim, kv_heads * head_dim);
        let q = uniform(1, length * width);
        let (k, v) = (uniform(2, length * kv), uniform(3, length * kv));
        let mut out = vec![f32::NAN; q.len()];
        let rows = |data, stride| Rows { data, stride };
        let mut scratch = AttentionScratch::default();
        attend(attention, rows(&q, width), rows(&k, kv), rows(&v, kv), length, &mut scratch, &mut out);
        for t in 0..length {
            for head in 0..heads {
                let want = expect(attention, &q, &k, &v, t, head);
                for (i, want) in want.iter().enumerate() {
                    let got = f64::from(out[t * width + head * head_dim + i]);
                    assert!(
                        (got - want).abs() <= 1e-5,
                        "{attention:?}, length {length}, at {t} {head} {i}: {got}, expected {want}"
                    );
                }
            }
        }
    }

    const PLAIN: Attention<'_> = Attention {
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
        scale: 0.35,
        softcap: None,
        window: None,
        rotary: None,
    };

    #[test]
    fn attention_matches_its_definition_at_awkward_lengths() {
        for length in [1, 2, 13, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1] {
            check(&PLAIN, length);
            check(&Attention { head_dim: 1, ..PLAIN }, length);
            check(&Attention { heads: 6, kv_heads: 2, head_dim: 5, ..PLAIN }, length);
        }
    }

    #[test]
    fn groups_windows_caps_and_rotation_match_their_definition() {
        let table = RotaryTable::new(&[1.0, 0.3, 0.01], 1.2, 100);
        for (heads, kv_heads) in [(4, 4), (4, 1), (9, 3), (70, 1)] {
            for window in [None, Some(1), Some(7), Some(64), Some(1000)] {
                for softcap in [None, Some(1.5)] {
                    for rotary in [None, Some(&table)] {
                        let attention = Attention { heads, kv_heads, softcap, window, rotary, ..PLAIN };
                        check(&attention, 23);
                    }
                }
            }
        }
        check(&Attention { heads: 3, window: Some(5), rotary: Some(&table), kv_heads: 3, ..PLAIN }, 100);
        check(&Attention { heads: 4, window: Some(33), softcap: Some(2.0), kv_heads: 2, ..PLAIN }, 150);
    }

    #[test]
    fn weights_are_those_of_the_softmax_at_every_level() {
        let block = Block { start: 40, positions: 5, group: 2, first_key: 11, keys: 34, window: 30 };
        let cells = uniform(4, block.rows() * block.keys);
        for level in available() {
            for cap in [0.0, 0.7] {
                let (mut scores, mut sums) = (cells.clone(), vec![0.0; block.rows()]);
                weights_at(level, block, cap, &mut scores, &mut sums);
                for row in 0..block.rows() {
                    let t = block.start + row / 2;
                    let of = |key: usize| {
                        let x = f64::from(cells[row * block.keys + key]);
                        if cap == 0.0 { x } else { f64::from(cap) * (x / f64::from(cap)).tanh() }
                    };
                    let seen = |key: usize| (t - 29..=t).contains(&(key + block.first_key));
                    let total: f64 = (0..block.keys).filter(|key| seen(*key)).map(|key| of(key).exp()).sum();
                    for key in 0..block.keys {
                        let want = if seen(key) { of(key).exp() / total } else { 0.0 };
                        let got = f64::from(scores[row * block.keys + key]) / f64::from(sums[row]);
                        assert!((got - want).abs() <= 1e-6 * want.max(1e-3), "{level:?} {cap} {row} {key}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_bad_query_spoils_its_own_row_only() {
        let length = 70;
        for bad in [f32::NAN, f32::INFINITY] {
            let (mut q, k, v) = (uniform(5, length * 8), uniform(6, length * 8), uniform(7, length * 8));
            q[30 * 8] = bad;
            let mut out = vec![0.0; q.len()];
            let rows = |data| Rows { data, stride: 8 };
            let mut scratch = AttentionScratch::default();
            attend(&PLAIN, rows(&q), rows(&k), rows(&v), length, &mut scratch, &mut out);
            for (t, row) in out.chunks(8).enumerate() {
                assert_eq!(row.iter().all(|x| x.is_nan()), t == 30, "{bad} at {t}");
                assert!(t == 30 || row.iter().all(|x| x.is_finite()));
            }
        }
    }
}
