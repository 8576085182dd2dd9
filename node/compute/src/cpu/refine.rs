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
fn decide<V: Lanes>(
    residual: &[f32; LANES],
    delta: &[f32; LANES],
    up: &mut [f32; LANES],
    curvature: f32,
) -> (V, u32) {
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
fn sweep_tile<V: Lanes>(
    width: usize,
    h: &[f32],
    stride: usize,
    residual: &mut Tile,
    delta: &Tile,
    up: &mut Tile,
    flips: &mut Tile,
) -> u64 {
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
fn pass<V: Lanes>(
    rows: usize,
    cols: usize,
    block: Range<usize>,
    h: &[f32],
    residual: &[f32],
    delta: &[f32],
    up: &mut [f32],
    flips: &mut [f32],
) -> u64 {
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
        fn $name(
            rows: usize,
            cols: usize,
            block: Range<usize>,
            h: &[f32],
            residual: &[f32],
            delta: &[f32],
            up: &mut [f32],
            flips: &mut [f32],
        ) -> u64 {
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
pub fn refine_block(
    rows: usize,
    cols: usize,
    block: Range<usize>,
    h: &[f32],
    residual: &[f32],
    delta: &[f32],
    up: &mut [f32],
    flips: &mut [f32],
) -> u64 {
    refine_block_at(isa(), rows, cols, block, h, residual, delta, up, flips)
}

/// The same at a given level.
///
/// # Panics
/// As [`refine_block`], or if this machine lacks `level`.
pub fn refine_block_at(
    level: Isa,
    rows: usize,
    cols: usize,
    block: Range<usize>,
    h: &[f32],
    residual: &[f32],
    delta: &[f32],
    up: &mut [f32],
    flips: &mut [f32],
) -> u64 {
    assert!(block.start <= block.end && block.end <= cols, "refine: block {block:?} outside {cols} columns");
    assert!(
        block.len() <= REFINE_BLOCK,
        "refine: block of {} columns, expected at most {REFINE_BLOCK}",
        block.len()
    );
    let area = rows.saturating_mul(cols);
    assert!(
        h.len() >= cols.saturating_mul(cols),
        "refine: h has {} elements, expected {cols} squared",
        h.len()
    );
    assert!(
        residual.len() >= area
            && delta.len() >= area
            && up.len() >= area
            && flips.len() >= rows.saturating_mul(block.len()),
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

/// At most `sweeps` passes over all columns of `rows` independent rows, each row until a pass flips nothing; returns flips and
/// passes of each row.
///
/// The rule of [`refine_block`] with the whole row as one block, weight by weight, `residual` (`w~ H - t`) following every flip
/// at once: what a GPU's threads do with a row. Here it is the plain form to compare with; a CPU is quicker in blocks.
///
/// # Panics
/// If a slice is shorter than its shape.
pub fn refine_rows(
    sweeps: u32,
    rows: usize,
    cols: usize,
    h: &[f32],
    residual: &mut [f32],
    delta: &[f32],
    up: &mut [f32],
) -> Vec<(u32, u32)> {
    let mut all = Vec::with_capacity(rows);
    for row in 0..rows {
        let line = row * cols..(row + 1) * cols;
        let (residual, up) = (&mut residual[line.clone()], &mut up[line.clone()]);
        let (mut flips, mut passes) = (0, 0);
        while passes < sweeps {
            let before = flips;
            for (column, delta) in delta[line.clone()].iter().enumerate() {
                let d = up[column].mul_add(-2.0, 1.0) * delta;
                let cost = d * d * h[column * cols + column];
                if (d * 2.0).mul_add(residual[column], cost) < cost * -FLIP_TOLERANCE {
                    flips += 1;
                    up[column] = 1.0 - up[column];
                    let follow = residual.iter_mut().zip(&h[column * cols..][..cols]);
                    follow.for_each(|(residual, weight)| *residual = d.mul_add(*weight, *residual));
                }
            }
            passes += 1;
            if flips == before {
                break;
            }
        }
        all.push((flips, passes));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::available;
    use crate::cpu::product::matmul;
    use crate::random::Stream;

    /// Small integers, so that every sum is exact and the kernel must agree with the definition bit for bit.
    struct Problem {
        rows: usize,
        cols: usize,
        h: Vec<f32>,
        target: Vec<f32>,
        delta: Vec<f32>,
        up: Vec<f32>,
    }

    fn problem(seed: u64, rows: usize, cols: usize) -> Problem {
        let mut stream = Stream::new(seed, rows as u64, cols as u32);
        let samples = cols + 3;
        let x: Vec<f32> = (0..samples * cols).map(|_| stream.index(7) as f32 - 3.0).collect();
        let mut h = vec![0.0; cols * cols];
        crate::cpu::matmul_tn(cols, cols, samples, 1.0, &x, cols, &x, cols, 0.0, &mut h, cols);
        let w: Vec<f32> = (0..rows * cols).map(|_| stream.index(9) as f32 * 0.125).collect();
        let mut target = vec![0.0; rows * cols];
        matmul(rows, cols, cols, 1.0, &w, cols, &h, cols, 0.0, &mut target, cols);
        let delta = (0..rows * cols).map(|_| if stream.index(10) == 0 { 0.0 } else { 1.0 }).collect();
        let up = (0..rows * cols).map(|_| stream.index(2) as f32).collect();
        Problem { rows, cols, h, target, delta, up }
    }

    impl Problem {
        /// `w~ H - t` with `lo = 0`.
        fn residual(&self) -> Vec<f32> {
            let (m, k) = (self.rows, self.cols);
            let w: Vec<f32> = self.up.iter().zip(&self.delta).map(|(u, d)| u * d).collect();
            let mut residual = self.target.clone();
            matmul(m, k, k, 1.0, &w, k, &self.h, k, -1.0, &mut residual, k);
            residual
        }

        /// The definition, one weight at a time over whole rows.
        fn reference_sweep(&mut self, block: Range<usize>) -> u64 {
            let (mut residual, mut count) = (self.residual(), 0);
            for row in 0..self.rows {
                let r = &mut residual[row * self.cols..][..self.cols];
                for j in block.clone() {
                    let at = row * self.cols + j;
                    let d = (1.0 - 2.0 * self.up[at]) * self.delta[at];
                    let cost = d * d * self.h[j * self.cols + j];
                    if 2.0 * d * r[j] + cost < -FLIP_TOLERANCE * cost {
                        self.up[at] = 1.0 - self.up[at];
                        count += 1;
                        for (r, h) in r.iter_mut().zip(&self.h[j * self.cols..]) {
                            *r += d * h;
                        }
                    }
                }
            }
            count
        }

        fn kernel_sweep(&mut self, level: Isa, block: Range<usize>) -> (u64, Vec<f32>) {
            let residual = self.residual();
            let mut flips = vec![f32::NAN; self.rows * block.len()];
            let count = refine_block_at(
                level,
                self.rows,
                self.cols,
                block,
                &self.h,
                &residual,
                &self.delta,
                &mut self.up,
                &mut flips,
            );
            (count, flips)
        }
    }

    #[test]
    fn kernel_flips_exactly_what_the_definition_flips() {
        for level in available() {
            for (rows, cols) in [(1, 1), (1, 13), (15, 40), (16, 128), (17, 131), (50, 30)] {
                for block in [0..cols.min(REFINE_BLOCK), cols / 2..cols, cols / 3..cols / 3 + 1, 0..0] {
                    let (mut got, mut want) = (problem(1, rows, cols), problem(1, rows, cols));
                    let before = got.up.clone();
                    let (count, flips) = got.kernel_sweep(level, block.clone());
                    let expected = want.reference_sweep(block.clone());
                    assert_eq!(
                        (count, &got.up),
                        (expected, &want.up),
                        "{level:?} [{rows}, {cols}], {block:?}"
                    );
                    for row in 0..rows {
                        for (i, j) in block.clone().enumerate() {
                            let at = row * cols + j;
                            assert_eq!(
                                flips[row * block.len() + i],
                                (got.up[at] - before[at]) * got.delta[at]
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn sweeps_with_the_products_between_end_in_a_local_optimum() {
        let (rows, cols) = (21, 150);
        let mut p = problem(3, rows, cols);
        let mut residual = p.residual();
        let mut flips = vec![0.0; rows * REFINE_BLOCK];
        let mut sweeps = 0;
        loop {
            let mut count = 0;
            for start in (0..cols).step_by(REFINE_BLOCK) {
                let block = start..cols.min(start + REFINE_BLOCK);
                let width = block.len();
                count += refine_block(rows, cols, block, &p.h, &residual, &p.delta, &mut p.up, &mut flips);
                matmul(
                    rows,
                    cols,
                    width,
                    1.0,
                    &flips,
                    width,
                    &p.h[start * cols..],
                    cols,
                    1.0,
                    &mut residual,
                    cols,
                );
            }
            sweeps += 1;
            assert!(sweeps < 100, "no end in sight");
            if count == 0 {
                break;
            }
        }
        assert!(sweeps > 1, "the problem was solved before it began");
        assert_eq!(residual, p.residual(), "the residual was carried along exactly");
        for (at, residual) in residual.iter().enumerate() {
            let d = (1.0 - 2.0 * p.up[at]) * p.delta[at];
            let curvature = p.h[at % cols * cols + at % cols];
            assert!(
                2.0 * d * residual + d * d * curvature >= -FLIP_TOLERANCE * d * d * curvature,
                "weight {at} could flip"
            );
        }
    }

    #[test]
    fn a_nan_residual_flips_nothing() {
        let (mut up, mut flips) = ([0.0; 3], [1.0; 3]);
        let h = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        assert_eq!(refine_block(1, 3, 0..3, &h, &[f32::NAN; 3], &[1.0; 3], &mut up, &mut flips), 0);
        assert_eq!((up, flips), ([0.0; 3], [0.0; 3]));
    }

    #[test]
    #[should_panic(expected = "expected at most 128")]
    fn long_blocks_are_refused() {
        let (h, mut m) = (vec![0.0; 200 * 200], vec![0.0; 200]);
        let zeros = m.clone();
        refine_block(1, 200, 0..129, &h, &zeros, &zeros, &mut m, &mut zeros.clone());
    }
}
