//! Launches of the decoder's kernels: the arguments and grid of each.
//!
//! Not here: checking what they are given (`cuda::decoder`).

use super::{Argument, Kernel, Launch, Size, THREADS, Value};
use crate::decoder::Heads;

/// Rows of queries that a block of attention takes.
const TILE: usize = 64;

/// Rows inside an array: the address of the first, and elements from one to the next.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct At {
    pub(in super::super) address: u64,
    pub(in super::super) stride: u32,
}

/// What [`embed`] reads.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct EmbedFrom {
    pub(in super::super) ids: u64,
    pub(in super::super) weight: u64,
    /// 0 where there are none.
    pub(in super::super) places: u64,
    /// 0 where there is none.
    pub(in super::super) learned: u64,
}

pub(in super::super) fn embed(
    size: Size,
    (count, width): (u32, u32),
    scale: f32,
    from: EmbedFrom,
    out: u64,
) -> Launch<8> {
    let (grid, block) = size.rows(count, width);
    Launch {
        kernel: Kernel::Embed,
        grid,
        block,
        arguments: [
            ("count", Value::U32(count)),
            ("width", Value::U32(width)),
            ("scale", Value::F32(scale)),
            ("ids", Value::Read(from.ids)),
            ("weight", Value::Read(from.weight)),
            ("places", Value::Read(from.places)),
            ("learned", Value::Read(from.learned)),
            ("out", Value::Write(out)),
        ],
    }
}

pub(in super::super) fn rms_norm(
    size: Size,
    (rows, width): (u32, u32),
    epsilon: f32,
    (x, weight): (u64, u64),
    out: u64,
) -> Launch<6> {
    let [rows_argument, width, epsilon] = norm(rows, width, epsilon);
    Launch {
        kernel: Kernel::RmsNorm,
        grid: size.warps(rows),
        block: (THREADS, 1),
        arguments: [
            rows_argument,
            width,
            epsilon,
            ("x", Value::Read(x)),
            ("weight", Value::Read(weight)),
            ("out", Value::Write(out)),
        ],
    }
}

pub(in super::super) fn layer_norm(
    size: Size,
    (rows, width): (u32, u32),
    epsilon: f32,
    (x, weight, bias): (u64, u64, u64),
    out: u64,
) -> Launch<7> {
    let [rows_argument, width, epsilon] = norm(rows, width, epsilon);
    Launch {
        kernel: Kernel::LayerNorm,
        grid: size.warps(rows),
        block: (THREADS, 1),
        arguments: [
            rows_argument,
            width,
            epsilon,
            ("x", Value::Read(x)),
            ("weight", Value::Read(weight)),
            ("bias", Value::Read(bias)),
            ("out", Value::Write(out)),
        ],
    }
}

fn norm(rows: u32, width: u32, epsilon: f32) -> [Argument; 3] {
    [("rows", Value::U32(rows)), ("width", Value::U32(width)), ("epsilon", Value::F32(epsilon))]
}

/// Sine and cosine, and each token's row of them.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Angles {
    pub(in super::super) positions: u64,
    pub(in super::super) cos: u64,
    pub(in super::super) sin: u64,
    pub(in super::super) pairs: u32,
}

pub(in super::super) fn rotate(
    size: Size,
    (tokens, heads, head_dim): (u32, u32, u32),
    angles: Angles,
    x: At,
    out: At,
) -> Launch<11> {
    let (grid, block) = size.rows(tokens.saturating_mul(heads), head_dim);
    Launch {
        kernel: Kernel::Rotate,
        grid,
        block,
        arguments: [
            ("tokens", Value::U32(tokens)),
            ("heads", Value::U32(heads)),
            ("head_dim", Value::U32(head_dim)),
            ("pairs", Value::U32(angles.pairs)),
            ("positions", Value::Read(angles.positions)),
            ("cos", Value::Read(angles.cos)),
            ("sin", Value::Read(angles.sin)),
            ("x", Value::Read(x.address)),
            ("stride", Value::U32(x.stride)),
            ("out", Value::Write(out.address)),
            ("out_stride", Value::U32(out.stride)),
        ],
    }
}

/// [`Heads`] as the kernels count them.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct HeadCounts {
    pub(in super::super) heads: u32,
    pub(in super::super) kv_heads: u32,
    pub(in super::super) head_dim: u32,
    /// 0: none.
    pub(in super::super) window: u32,
}

/// `longest`: tokens of the longest sequence. The launch's grid is repeated along z for each sequence.
pub(in super::super) fn attention(
    heads: &Heads,
    counts: HeadCounts,
    longest: usize,
    starts: u64,
    [q, k, v]: [At; 3],
    out: u64,
) -> Launch<14> {
    let HeadCounts { heads: all, kv_heads, head_dim, window } = counts;
    let rows = longest.saturating_mul(all.checked_div(kv_heads).unwrap_or(0) as usize);
    Launch {
        kernel: match head_dim {
            ..=64 => Kernel::Attention64,
            65..=128 => Kernel::Attention128,
            _ => Kernel::Attention256,
        },
        grid: (u32::try_from(rows.div_ceil(TILE)).unwrap_or(u32::MAX), kv_heads),
        block: (THREADS, 1),
        arguments: [
            ("starts", Value::Read(starts)),
            ("heads", Value::U32(all)),
            ("kv_heads", Value::U32(kv_heads)),
            ("head_dim", Value::U32(head_dim)),
            ("scale", Value::F32(heads.scale)),
            ("softcap", Value::F32(heads.softcap.unwrap_or(0.0))),
            ("window", Value::U32(window)),
            ("q", Value::Read(q.address)),
            ("q_stride", Value::U32(q.stride)),
            ("k", Value::Read(k.address)),
            ("k_stride", Value::U32(k.stride)),
            ("v", Value::Read(v.address)),
            ("v_stride", Value::U32(v.stride)),
            ("out", Value::Write(out)),
        ],
    }
}

/// A tile of scores: its rows are those of all heads, one after the other.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Scores {
    pub(in super::super) rows: u32,
    pub(in super::super) heads: u32,
    pub(in super::super) keys: u32,
    /// Elements from one row to the next.
    pub(in super::super) pitch: u32,
    /// Position of the first row's query, and of the first key.
    pub(in super::super) first_row: u32,
    pub(in super::super) first_key: u32,
}

pub(in super::super) fn softmax_rows(heads: &Heads, tile: Scores, scores: u64) -> Launch<8> {
    Launch {
        kernel: Kernel::SoftmaxRows,
        grid: (tile.rows, tile.heads),
        block: (THREADS, 1),
        arguments: [
            ("keys", Value::U32(tile.keys)),
            ("pitch", Value::U32(tile.pitch)),
            ("first_row", Value::U32(tile.first_row)),
            ("first_key", Value::U32(tile.first_key)),
            ("scale", Value::F32(heads.scale)),
            ("softcap", Value::F32(heads.softcap.unwrap_or(0.0))),
            // A window of more positions than can be counted is none.
            ("window", Value::U32(heads.window.map_or(0, |window| u32::try_from(window).unwrap_or(0)))),
            ("scores", Value::Write(scores)),
        ],
    }
}

/// A kind of activation, as `activation.cu` numbers them, and its two parameters.
pub(in super::super) type Function = (u32, f32, f32);

pub(in super::super) fn gate(
    size: Size,
    (rows, width): (u32, u32),
    (kind, a, b): Function,
    gate: At,
    up: At,
    out: u64,
) -> Launch<10> {
    let (grid, block) = size.rows(rows, width);
    Launch {
        kernel: Kernel::Gate,
        grid,
        block,
        arguments: [
            ("rows", Value::U32(rows)),
            ("width", Value::U32(width)),
            ("kind", Value::U32(kind)),
            ("a", Value::F32(a)),
            ("b", Value::F32(b)),
            ("gate", Value::Read(gate.address)),
            ("gate_stride", Value::U32(gate.stride)),
            ("up", Value::Read(up.address)),
            ("up_stride", Value::U32(up.stride)),
            ("out", Value::Write(out)),
        ],
    }
}

pub(in super::super) fn activate(
    size: Size,
    (rows, width): (u32, u32),
    (kind, a, b): Function,
    x: u64,
    out: u64,
) -> Launch<7> {
    let (grid, block) = size.rows(rows, width);
    Launch {
        kernel: Kernel::Activate,
        grid,
        block,
        arguments: [
            ("rows", Value::U32(rows)),
            ("width", Value::U32(width)),
            ("kind", Value::U32(kind)),
            ("a", Value::F32(a)),
            ("b", Value::F32(b)),
            ("x", Value::Read(x)),
            ("out", Value::Write(out)),
        ],
    }
}

pub(in super::super) fn add(size: Size, len: usize, a: u64, b: u64, out: u64) -> Launch<4> {
    Launch {
        kernel: Kernel::Add,
        grid: size.flat(len),
        block: (THREADS, 1),
        arguments: [
            ("len", Value::U64(len as u64)),
            ("a", Value::Read(a)),
            ("b", Value::Read(b)),
            ("out", Value::Write(out)),
        ],
    }
}

pub(in super::super) fn to_bf16(size: Size, len: usize, x: u64, out: u64) -> Launch<3> {
    Launch { kernel: Kernel::ToBf16, ..from_bf16(size, len, x, out) }
}

pub(in super::super) fn from_bf16(size: Size, len: usize, x: u64, out: u64) -> Launch<3> {
    let arguments = [("len", Value::U64(len as u64)), ("x", Value::Read(x)), ("out", Value::Write(out))];
    Launch { kernel: Kernel::FromBf16, grid: size.flat(len), block: (THREADS, 1), arguments }
}

pub(in super::super) fn softcap(size: Size, len: usize, cap: f32, x: u64) -> Launch<3> {
    Launch {
        kernel: Kernel::Softcap,
        grid: size.flat(len),
        block: (THREADS, 1),
        arguments: [("len", Value::U64(len as u64)), ("cap", Value::F32(cap)), ("x", Value::Write(x))],
    }
}

pub(in super::super) fn route(
    size: Size,
    (tokens, experts): (u32, u32),
    (top_k, normalise): (u32, bool),
    logits: u64,
    weights: u64,
) -> Launch<6> {
    Launch {
        kernel: Kernel::Route,
        grid: size.warps(tokens),
        block: (THREADS, 1),
        arguments: [
            ("tokens", Value::U32(tokens)),
            ("experts", Value::U32(experts)),
            ("top_k", Value::U32(top_k)),
            ("normalise", Value::U32(normalise.into())),
            ("logits", Value::Read(logits)),
            ("weights", Value::Write(weights)),
        ],
    }
}

pub(in super::super) fn chosen(
    (tokens, experts): (u32, u32),
    all_tokens: bool,
    weights: u64,
    lists: u64,
    counts: u64,
) -> Launch<6> {
    Launch {
        kernel: Kernel::Chosen,
        grid: (experts, 1),
        block: (THREADS, 1),
        arguments: [
            ("tokens", Value::U32(tokens)),
            ("experts", Value::U32(experts)),
            ("all_tokens", Value::U32(all_tokens.into())),
            ("weights", Value::Read(weights)),
            ("lists", Value::Write(lists)),
            ("counts", Value::Write(counts)),
        ],
    }
}

/// `count` rows of `x`, one for each of `tokens`, for `expert` of `experts`.
pub(in super::super) fn combine(
    size: Size,
    (count, width): (u32, u32),
    (experts, expert): (u32, u32),
    [weights, tokens, x]: [u64; 3],
    out: u64,
) -> Launch<8> {
    let (grid, block) = size.rows(count, width);
    Launch {
        kernel: Kernel::Combine,
        grid,
        block,
        arguments: [
            ("count", Value::U32(count)),
            ("width", Value::U32(width)),
            ("experts", Value::U32(experts)),
            ("expert", Value::U32(expert)),
            ("weights", Value::Read(weights)),
            ("tokens", Value::Read(tokens)),
            ("x", Value::Read(x)),
            ("out", Value::Write(out)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{SIZE, check};
    use super::*;

    const HEADS: Heads =
        Heads { heads: 6, kv_heads: 2, head_dim: 64, scale: 0.5, softcap: None, window: Some(7) };

    fn attention_of(head_dim: u32) -> Launch<14> {
        let at = At { address: 1, stride: 9 };
        let counts = HeadCounts { heads: 6, kv_heads: 2, head_dim, window: 7 };
        attention(&HEADS, counts, 50, 1, [at; 3], 2)
    }

    #[test]
    fn arguments_stand_in_the_order_and_with_the_types_of_the_sources() {
        let at = At { address: 1, stride: 9 };
        check(embed(SIZE, (3, 5), 1.0, EmbedFrom { ids: 1, weight: 2, places: 0, learned: 0 }, 3));
        check(rms_norm(SIZE, (3, 5), 1e-5, (1, 2), 3));
        check(layer_norm(SIZE, (3, 5), 1e-5, (1, 2, 3), 4));
        check(rotate(SIZE, (3, 2, 8), Angles { positions: 1, cos: 2, sin: 3, pairs: 4 }, at, at));
        [64, 65, 128, 129, 256].into_iter().for_each(|width| check(attention_of(width)));
        let tile = Scores { rows: 3, heads: 2, keys: 5, pitch: 8, first_row: 2, first_key: 0 };
        check(softmax_rows(&HEADS, tile, 1));
        check(gate(SIZE, (3, 5), (1, 0.0, 0.0), at, at, 2));
        check(activate(SIZE, (3, 5), (1, 0.0, 0.0), 1, 2));
        check(add(SIZE, 5, 1, 2, 3));
        check(softcap(SIZE, 5, 2.0, 1));
        check(to_bf16(SIZE, 5, 1, 2));
        check(from_bf16(SIZE, 5, 1, 2));
        check(route(SIZE, (3, 8), (2, true), 1, 2));
        check(chosen((3, 8), false, 1, 2, 3));
        check(combine(SIZE, (3, 5), (8, 1), [1, 2, 3], 4));
    }

    #[test]
    fn attention_has_a_block_for_every_64_queries_of_a_key_head() {
        // 50 tokens, 3 query heads to a key head.
        assert_eq!(attention_of(64).grid, (3, 2));
        let kernels = [1, 64, 65, 128, 129].map(|width| attention_of(width).kernel);
        use Kernel::{Attention64, Attention128, Attention256};
        assert_eq!(kernels, [Attention64, Attention64, Attention128, Attention128, Attention256]);
    }
}
