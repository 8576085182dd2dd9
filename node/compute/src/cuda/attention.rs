//! Attention by two products and a softmax between them: tensor cores do what `attention.cu` does with multiply-adds.
//!
//! For queries in tiles, so that a tile's scores stay near: the keys behind a tile's last query are left out, the others count as 0 where a
//! query does not see them. Which tiles there are follows from the sequence's length and the heads: the same bits from any lane.
//!
//! Not here: short sequences and products of all bits (`attention.cu`), rotation (`decoder`).
#![expect(unsafe_code, reason = "products on raw device addresses, checked here")]

use super::blas::{Batch, Digits, WORKSPACE_BYTES};
use super::column_major::ColumnMajor;
use super::decoder::CudaLane;
use super::device::{Precision, count, offset};
use super::kernels::decoder::{self as launches, At, Scores};
use crate::decoder::Heads;
use crate::device::{DeviceError, Product};
use crate::shape::area;

/// Queries of a tile, at most.
const TILE: usize = 1024;
/// Scores of a tile, unless one query has more.
const TILE_SCORES: usize = 1 << 24;
/// Tokens a sequence must have, on average: below, launches take longer than what they compute.
const TOKENS_MIN: usize = 512;

/// Heads whose products are one call: all of them read one head of keys, or each its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unit {
    first: usize,
    heads: usize,
    kv_head: usize,
    shares_keys: bool,
}

/// Queries `top..top + rows` and the keys `first_key..first_key + keys` that any of them sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    top: usize,
    rows: usize,
    first_key: usize,
    keys: usize,
}

impl Tile {
    /// Elements from one row of scores to the next: rows begin where four numbers do.
    fn pitch(self) -> usize {
        self.keys.next_multiple_of(4)
    }
}

fn units(heads: &Heads) -> Vec<Unit> {
    let group = heads.heads / heads.kv_heads.max(1);
    match group {
        1 => {
            // As many at once as grouped queries usually are.
            let firsts = (0..heads.heads).step_by(8);
            let unit = |first: usize| Unit {
                first,
                heads: (heads.heads - first).min(8),
                kv_head: first,
                shares_keys: false,
            };
            firsts.map(unit).collect()
        }
        _ => (0..heads.kv_heads)
            .map(|kv_head| Unit { first: kv_head * group, heads: group, kv_head, shares_keys: true })
            .collect(),
    }
}

/// Tiles of a sequence of `length` tokens for `heads` heads at once.
fn tiles(length: usize, heads: usize, window: Option<usize>) -> impl Iterator<Item = Tile> {
    let fitting = TILE_SCORES / area(length.next_multiple_of(4), heads.max(1)).max(1);
    let height = fitting.clamp(1, TILE);
    (0..length).step_by(height).map(move |top| {
        let rows = height.min(length - top);
        let seen = window.map_or(0, |window| (top + 1).saturating_sub(window));
        let first_key = seen / 4 * 4;
        Tile { top, rows, first_key, keys: top + rows - first_key }
    })
}

impl CudaLane {
    /// Whether attention of such sequences goes by products.
    pub(super) fn attends_by_products(&self, lengths: &[usize]) -> bool {
        let tokens: usize = lengths.iter().sum();
        self.cuda.opened.precision == Precision::Tf32 && tokens >= area(TOKENS_MIN, lengths.len().max(1))
    }

    /// Attention of sequences of these lengths, one after the other; queries and keys are turned. `out`: `[tokens, heads * head_dim]`.
    ///
    /// The addresses hold rows of all tokens, which the caller has checked.
    pub(super) fn attend_by_products(
        &mut self,
        heads: &Heads,
        lengths: &[usize],
        qkv: [At; 3],
        out: u64,
    ) -> Result<(), DeviceError> {
        let units = units(heads);
        let largest = |unit: &Unit| {
            let tiles = lengths.iter().flat_map(|length| tiles(*length, unit.heads, heads.window));
            tiles.map(|tile| area(area(unit.heads, tile.rows), tile.pitch())).max()
        };
        let len = units.iter().filter_map(largest).max().unwrap_or(0);
        let mut scores = self.cuda.allocate::<f32>(len)?;
        let scores = self.cuda.written("scores", &mut scores, len)?;
        let width = area(heads.heads, heads.head_dim);
        let mut begin = 0;
        for length in lengths {
            for unit in &units {
                let [q, k, v] = qkv;
                let queries = At { address: row(q, begin, unit.first * heads.head_dim), ..q };
                let at_keys = |x: At| At { address: row(x, begin, unit.kv_head * heads.head_dim), ..x };
                let out = At {
                    address: offset(out, begin * width + unit.first * heads.head_dim),
                    stride: count("attention out", width)?,
                };
                for tile in tiles(*length, unit.heads, heads.window) {
                    self.tile(heads, *unit, tile, [queries, at_keys(k), at_keys(v), out], scores)?;
                }
            }
            begin += length;
        }
        Ok(())
    }

    /// `of`: queries, keys, values and results of the unit's first head, from the sequence's first token on.
    fn tile(
        &self,
        heads: &Heads,
        unit: Unit,
        tile: Tile,
        [q, k, v, out]: [At; 4],
        scores: u64,
    ) -> Result<(), DeviceError> {
        let Tile { top, rows, first_key, keys } = tile;
        let (pitch, depth) = (tile.pitch(), heads.head_dim);
        let own = depth as i64;
        let of_keys = if unit.shares_keys { 0 } else { own };
        let of_scores = area(rows, pitch) as i64;
        let stride = |at: At| at.stride as usize;
        let product = Product::new(rows, keys, depth);
        let args = ColumnMajor::new(product, (stride(q), false), (stride(k), true), pitch)?;
        let batch = |first, second, out| Batch { count: unit.heads as i32, steps: [first, second, out] };
        self.product(&args, batch(of_keys, own, of_scores), [row(k, first_key, 0), row(q, top, 0), scores])?;
        let shape = Scores {
            rows: count("attention rows", rows)?,
            heads: count("attention heads", unit.heads)?,
            keys: count("attention keys", keys)?,
            pitch: count("attention keys", pitch)?,
            first_row: count("attention positions", top)?,
            first_key: count("attention positions", first_key)?,
        };
        self.cuda.launch(launches::softmax_rows(heads, shape, scores))?;
        let product = Product::new(rows, depth, keys);
        let args = ColumnMajor::new(product, (pitch, false), (stride(v), false), stride(out))?;
        self.product(&args, batch(of_keys, of_scores, own), [row(v, first_key, 0), scores, row(out, top, 0)])
    }

    fn product(&self, args: &ColumnMajor, batch: Batch, at: [u64; 3]) -> Result<(), DeviceError> {
        let opened = &self.cuda.opened;
        opened.context.bind_to_thread().map_err(|error| self.cuda.driver(error))?;
        // SAFETY: `attend_by_products` was given arrays of all tokens' rows, of which tiles are parts; scores are as long as the
        // largest tile's; results and factors are different arrays.
        unsafe { self.cuda.blas.products(args, Digits::Rough, batch, at) }
            .map_err(|error| opened.subject(WORKSPACE_BYTES).blas(error))
    }
}

/// The address of an element of a row.
fn row(at: At, row: usize, column: usize) -> u64 {
    offset(at.address, area(row, at.stride as usize) + column)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads =
        Heads { heads: 12, kv_heads: 3, head_dim: 64, scale: 0.5, softcap: None, window: None };

    #[test]
    fn heads_that_share_keys_go_together_and_others_eight_at_a_time() {
        let of = |heads, kv_heads| -> Vec<(usize, usize, usize)> {
            let all = units(&Heads { heads, kv_heads, ..HEADS });
            all.iter().map(|unit| (unit.first, unit.heads, unit.kv_head)).collect()
        };
        assert_eq!(of(12, 3), [(0, 4, 0), (4, 4, 1), (8, 4, 2)]);
        assert_eq!(of(12, 12), [(0, 8, 0), (8, 4, 8)]);
        assert_eq!(of(5, 1), [(0, 5, 0)]);
    }

    #[test]
    fn tiles_cover_every_query_with_the_keys_it_sees_and_their_scores_have_room() {
        for (length, heads, window) in
            [(1, 1, None), (1025, 4, None), (2048, 4, Some(100)), (5000, 8, Some(1)), (40_000, 8, None)]
        {
            let mut next = 0;
            for tile in tiles(length, heads, window) {
                assert_eq!(tile.top, next);
                assert_eq!(tile.first_key + tile.keys, tile.top + tile.rows);
                let first_seen = window.map_or(0, |window| (tile.top + 1).saturating_sub(window));
                assert!(
                    tile.first_key <= first_seen && tile.first_key + 4 > first_seen.min(tile.first_key + 3)
                );
                assert!(tile.rows == 1 || heads * tile.rows * tile.pitch() <= TILE_SCORES);
                next += tile.rows;
            }
            assert_eq!(next, length);
        }
        assert_eq!(tiles(0, 4, None).count(), 0);
    }
}
