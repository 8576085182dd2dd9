//! Coordinate descent on {floor, ceil}, one block of columns at a time.
//!
//! Method: rows are independent, so 16 of them go through the block side by side as vector lanes, in column order, with the
//! block's residual and the flips kept transposed on the stack; a column no lane flips costs one comparison. What happens
//! outside the block is one product, done by the caller: most of a sweep's work is products.
//!
//! Not here: sweeps, block order, stopping (`solver`).
#![expect(unsafe_code, reason = "calls functions compiled for an instruction-set level found at run time")]

use std::ops::Range;

use super::isa::{Isa, isa};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{LANES, Lanes, Plain};

/// Columns per refinement block that the caller should use; blocks may be shorter, never longer.
pub const REFINE_BLOCK: usize = 128;

/// A flip must win more than this fraction of its own curvature `d^2 H_jj`: differences below it are rounding, and
/// would let two weights flip for ever.
pub const FLIP_TOLERANCE: f32 = 1e-5;

/// `LANES` rows of a block, transposed: `[column][lane]`.
type Tile = [[f32; LANES]; REFINE_BLOCK];

/// Which rows and columns of the full matrices a tile is.
#[derive(Clone, Copy)]
struct Window {
    row: usize,
    lanes: usize,
    start: usize,
    width: usize,
    cols: usize,
}

#[inline(always)]
fn load(tile: &mut Tile, matrix: &[f32], at: Window) {
    for lane in 0..at.lanes {
        let row = &matrix[(at.row + lane) * at.cols + at.start..][..at.width];
        for (column, value) in tile.iter_mut().zip(row) {
            column[lane] = *value;
        }
    }
}

#[inline(always)]
fn store(tile: &Tile, matrix: &mut [f32], at: Window) {
    for lane in 0..at.lanes {
        let row = &mut matrix[(at.row + lane) * at.cols + at.start..][..at.width];
        for (column, value) in tile.iter().zip(row) {
            *value = column[lane];
        }
    }
}

/// The flips of one column, `d` per lane (0 if kept), and which lanes flip; updates `up`.
#[inline(always)]
fn decide<V: Lanes>(residual: &[f32; LANES], delta: &[f32; LANES], up: &mut [f32; LANES], curvature: f32) -> (V, u32) {
    let was = V::load(up);
    let direction = was.fma(V::splat(-2.0), V::splat(1.0));
    let d = direction.mul(V::load(delta));
    let cost = d.mul(d).mul(V::splat(curvature));
    let change = d.mul(V::splat(2.0)).fma(V::load(residual), cost);
    let bound = cost.mul(V::splat(-FLIP_TOLERANCE));
    let (flips, bits) = change.less_then(bound, d);
    if bits != 0 {
        change.less_then(bound, direction).0.fma(V::splat(1.0), was).store(up);
    }
    (flips, bits)
}

/// One pass over a transposed tile; `h` starts at the block's first row and column. Returns the number of flips.
#[inline(always)]
fn sweep_tile<V: Lanes>(width: usize, h: &[f32], stride: usize, residual: &mut Tile, delta: &Tile, up: &mut Tile, flips: &mut Tile) -> u64 {
    let mut count = 0;
    for j in 0..width {
        let h_row = &h[j * stride..][..width];
        let (flipped, bits) = decide::<V>(&residual[j], &delta[j], &mut up[j], h_row[j]);
        flipped.store(&mut flips[j]);
        count += u64::from(bits.count_ones());
        if bits != 0 {
            for (column, weight) in residual[j + 1..width].iter_mut().zip(&h_row[j + 1..]) {
                flipped.fma(V::splat(*weight), V::load(column)).store(column);
            }
        }
    }
    count
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a kernel: each argument is one array")]
fn pass<V: Lanes>(rows: usize, cols: usize, block: Range<usize>, h: &[f32], residual: &[f32], delta: &[f32], up: &mut [f32], flips: &mut [f32]) -> u64 {
    let width = block.len();
    let h = &h[block.start * cols + block.start..];
    let [mut r, mut d, mut u, mut f] = [[[0.0; LANES]; REFINE_BLOCK]; 4];
    let mut count = 0;
    for row in (0..rows).step_by(LANES) {
        let lanes = LANES.min(rows - row);
        let at = Window { row, lanes, start: block.start, width, cols };
        if lanes < LANES {
            // Lanes without a row must not flip: their scale is 0.
            d = [[0.0; LANES]; REFINE_BLOCK];
        }
        load(&mut r, residual, at);
        load(&mut d, delta, at);
        load(&mut u, up, at);
        count += sweep_tile::<V>(width, h, cols, &mut r, &d, &mut u, &mut f);
        store(&u, up, at);
        store(&f, flips, Window { start: 0, cols: width, ..at });
    }
    count
}

/// Compiles `pass` for one level.
macro_rules! level {
    ($name:ident, $lanes:ty, #[$attribute:meta]) => {
        #[$attribute]
        #[expect(clippy::too_many_arguments, reason = "a kernel: each argument is one array")]
        fn $name(rows: usize, cols: usize, block: Range<usize>, h: &[f32], residual: &[f32], delta: &[f32], up: &mut [f32], flips: &mut [f32]) -> u64 {
            pass::<$lanes>(rows, cols, block, h, residual, delta, up, flips)
        }
    };
}

#[cfg(target_arch = "x86_64")]
level!(pass_avx512, Avx512, #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]);
#[cfg(target_arch = "x86_64")]
level!(pass_avx2, Avx2, #[target_feature(enable = "avx2,fma")]);
level!(pass_baseline, Plain, #[inline(never)]);

/// One pass over the columns `block` of `rows` independent rows; returns how many weights flipped.
///
/// Minimises `w~ H w~^T - 2 w~ t` per row, with `residual = w~ H - t` at the values *before* the call. In column order:
/// the weight is `lo + up * delta`; flipping changes it by `d = +-delta` and the objective by `2 d r_j + d^2 H_jj`; it
/// is flipped if that is negative (strictly, beyond [`FLIP_TOLERANCE`]), and the block's later residuals follow.
///
/// `h: [cols, cols]` symmetric; `residual, delta, up: [rows, cols]` (`up` is 0.0 or 1.0 and is updated; `delta` 0 fixes
/// a weight); `flips: [rows, block.len()]` receives the `d` of each weight (0 if kept). `residual` is only read: the
/// caller adds `flips * h[block, :]` to *all* columns of it, one product of `rows * block.len() * cols`.
///
/// # Panics
/// If a slice is shorter than its shape, or the block is longer than [`REFINE_BLOCK`] or outside the columns.
#[expect(clippy::too_many_arguments, reason = "a kernel: each argument is one array")]
pub fn refine_block(rows: usize, cols: usize, block: Range<usize>, h: &[f32], residual: &[f32], delta: &[f32], up: &mut [f32], flips: &mut [f32]) -> u64 {
    refine_block_at(isa(), rows, cols, block, h, residual, delta, up, flips)
}

/// The same at a given level.
///
/// # Panics
/// As [`refine_block`], or if this machine lacks `level`.
#[expect(clippy::too_many_arguments, reason = "a kernel: each argument is one array")]
pub fn refine_block_at(level: Isa, rows: usize, cols: usize, block: Range<usize>, h: &[f32], residual: &[f32], delta: &[f32], up: &mut [f32], flips: &mut [f32]) -> u64 {
    assert!(block.start <= block.end && block.end <= cols, "refine: block {block:?} outside {cols} columns");
    assert!(block.len() <= REFINE_BLOCK, "refine: block of {} columns, expected at most {REFINE_BLOCK}", block.len());
    let area = rows.saturating_mul(cols);
    assert!(h.len() >= cols.saturating_mul(cols), "refine: h has {} elements, expected {cols} squared", h.len());
    assert!(
        residual.len() >= area && delta.len() >= area && up.len() >= area && flips.len() >= rows.saturating_mul(block.len()),
        "refine: an array is shorter than [{rows}, {cols}]"
    );
    assert!(level <= isa(), "this machine lacks {}", level.name());
    if block.is_empty() {
        return 0;
    }
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level <= isa()`, and `isa()` found these features on this machine.
        Isa::Avx512 => unsafe { pass_avx512(rows, cols, block, h, residual, delta, up, flips) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { pass_avx2(rows, cols, block, h, residual, delta, up, flips) },
        _ => pass_baseline(rows, cols, block, h, residual, delta, up, flips),
    }
}
