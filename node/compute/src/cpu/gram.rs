//! Gram and cross-Gram matrices, added into f32 accumulators in a fixed order.
//!
//! Method: samples in slabs of at most 512, inside a slab the lower triangle by recursive halving down to tiles of
//! 64 columns, so that nearly all work is large square products and little more than half of the full product is done.
//! Narrow matrices (depthwise convolutions: 9 or 25 columns) go through a kernel that reads each sample once and
//! keeps the sums in registers. An entry's summation order depends on the shape alone.
//!
//! Not here: exact sums over shards (fixed point, in `exec`), damping (`solver`).
#![expect(unsafe_code, reason = "calls functions compiled for an instruction-set level found at run time")]

use super::isa::{Isa, isa};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{LANES, Lanes, Plain};
use super::product::{SLAB, Stored, matmul_tn, multiply, slabs};
use crate::device::Product;

/// Columns of a tile on the diagonal, which is computed in full.
const TILE: usize = 64;
/// Widest matrix for the narrow kernel (by measurement: beyond it `gemm` is as fast).
const NARROW: usize = 32;
/// Samples summed before they are added to the result: the panel stays in the first-level cache, and short sums
/// lose less to rounding.
const PANEL: usize = 128;
/// Elements a narrow kernel may read past a panel's last sample.
const OVERREAD: usize = 2 * NARROW;

/// `g += x^T x`, lower triangle (row >= column) of `g`; some of the upper triangle is overwritten.
///
/// `x: [n, k]`, one sample per row; `g: [k, k]`. Follow with [`mirror_lower`] when all samples are in.
///
/// # Panics
/// If a slice does not hold its shape.
pub fn gram_lower(x: &[f32], n: usize, k: usize, g: &mut [f32]) {
    check(x.len(), n, k, g.len());
    if k <= NARROW {
        return narrow(isa(), x, x, n, k, true, g);
    }
    for rows in slabs(n, SLAB) {
        let x = &x[rows.start * k..rows.end * k];
        triangle(x, rows.len(), k, 0, k, g);
    }
}

/// The lower triangle of columns `start..end`, by halves.
fn triangle(x: &[f32], n: usize, k: usize, start: usize, end: usize, g: &mut [f32]) {
    let tiles = (end - start).div_ceil(TILE);
    if tiles <= 1 {
        return rectangle(x, n, k, start..end, start..end, g);
    }
    let middle = start + tiles / 2 * TILE;
    triangle(x, n, k, start, middle, g);
    rectangle(x, n, k, middle..end, start..middle, g);
    triangle(x, n, k, middle, end, g);
}

/// `g[rows, columns] += x[:, rows]^T x[:, columns]`.
fn rectangle(
    x: &[f32],
    n: usize,
    k: usize,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    g: &mut [f32],
) {
    let product = Product { m: rows.len(), n: columns.len(), k: n, alpha: 1.0, beta: 1.0 };
    let a = Stored { data: &x[rows.start..], stride: k, transposed: true };
    let b = Stored { data: &x[columns.start..], stride: k, transposed: false };
    multiply(product, a, b, &mut g[rows.start * k + columns.start..], k);
}

/// Copies the lower triangle of `g: [k, k]` to the upper.
///
/// # Panics
/// If `g` is shorter than `k * k`.
pub fn mirror_lower(g: &mut [f32], k: usize) {
    assert!(
        k.checked_mul(k).is_some_and(|area| area <= g.len()),
        "mirror: expected [{k}, {k}], actual {} elements",
        g.len()
    );
    const BLOCK: usize = 32;
    for row in (0..k).step_by(BLOCK) {
        for column in (0..=row).step_by(BLOCK) {
            for i in row..k.min(row + BLOCK) {
                for j in column..i.min(column + BLOCK) {
                    g[j * k + i] = g[i * k + j];
                }
            }
        }
    }
}

/// [`mirror_lower`] by at most `threads` threads.
///
/// # Panics
/// As there.
pub fn mirror_lower_by(g: &mut [f32], k: usize, threads: usize) {
    if threads < 2 || k < MIRRORED_ALONE {
        return mirror_lower(g, k);
    }
    assert!(
        k.checked_mul(k).is_some_and(|area| area <= g.len()),
        "mirror: expected [{k}, {k}], actual {} elements",
        g.len()
    );
    mirror_rows(&mut g[..k * k], 0, k, threads);
}

/// Smallest side for which threads are worth their start.
const MIRRORED_ALONE: usize = 1024;

/// The entries of `rows` (`[n, k]`, of which the first is row `first` of the whole) that are mirrored within them: those right of a
/// square are below it in the lower half, then the halves are on their own.
fn mirror_rows(rows: &mut [f32], first: usize, k: usize, threads: usize) {
    const BLOCK: usize = 32;
    let n = rows.len() / k;
    if n <= BLOCK {
        for i in 0..n {
            for j in 0..i {
                rows[j * k + first + i] = rows[i * k + first + j];
            }
        }
        return;
    }
    let half = n.div_ceil(2).next_multiple_of(BLOCK).min(n);
    let (upper, lower) = rows.split_at_mut(half * k);
    let lines = half.div_ceil(threads).next_multiple_of(BLOCK);
    let fill = |number: usize, lines_of: &mut [f32]| {
        let from = number * lines;
        for row in (0..n - half).step_by(BLOCK) {
            for (i, line) in lines_of.chunks_exact_mut(k).enumerate() {
                for j in row..(n - half).min(row + BLOCK) {
                    line[first + half + j] = lower[j * k + first + from + i];
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let parts = upper.chunks_mut(lines * k).enumerate();
        for (number, part) in parts {
            if threads > 1 {
                scope.spawn(move || fill(number, part));
            } else {
                fill(number, part);
            }
        }
    });
    let (mine, others) = (threads.div_ceil(2), threads / 2);
    if others == 0 {
        mirror_rows(upper, first, k, 1);
        return mirror_rows(lower, first + half, k, 1);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| mirror_rows(lower, first + half, k, others));
        mirror_rows(upper, first, k, mine);
    });
}

/// `c += x^T xq`, i.e. `c[i][j] += sum x_i xq_j`; `x`, `xq`: `[n, k]`, `c: [k, k]`.
///
/// # Panics
/// If a slice does not hold its shape.
pub fn cross_gram(x: &[f32], xq: &[f32], n: usize, k: usize, c: &mut [f32]) {
    check(x.len(), n, k, c.len());
    check(xq.len(), n, k, c.len());
    if k <= NARROW {
        return narrow(isa(), x, xq, n, k, false, c);
    }
    matmul_tn(k, k, n, 1.0, x, k, xq, k, 1.0, c, k);
}

fn check(x: usize, n: usize, k: usize, g: usize) {
    assert!(
        n.checked_mul(k).is_some_and(|area| area <= x),
        "gram: expected [{n}, {k}] samples, actual {x} elements"
    );
    assert!(
        k.checked_mul(k).is_some_and(|area| area <= g),
        "gram: expected a [{k}, {k}] result, actual {g} elements"
    );
}

/// The narrow kernel at a given level, panel by panel; `lower`: only the lower triangle is needed.
///
/// The last few samples go through a padded copy, so that the kernel may read past a sample's end.
fn narrow(level: Isa, x: &[f32], y: &[f32], n: usize, k: usize, lower: bool, c: &mut [f32]) {
    if k == 0 {
        return;
    }
    let (x, y) = (&x[..n * k], &y[..n * k]);
    let mut sums = [[0.0; NARROW]; NARROW];
    let direct = n.saturating_sub(OVERREAD.div_ceil(k));
    for start in (0..direct).step_by(PANEL) {
        let rows = PANEL.min(direct - start);
        panel(level, &x[start * k..], &y[start * k..], rows, k, lower, &mut sums);
        add(&sums, k, c);
    }
    let (x, y) = (&x[direct * k..], &y[direct * k..]);
    let mut padded = [[0.0; OVERREAD + NARROW + OVERREAD]; 2];
    padded[0][..x.len()].copy_from_slice(x);
    padded[1][..y.len()].copy_from_slice(y);
    panel(level, &padded[0], &padded[1], n - direct, k, lower, &mut sums);
    add(&sums, k, c);
}

fn add(sums: &[[f32; NARROW]; NARROW], k: usize, c: &mut [f32]) {
    for (row, sums) in c.chunks_exact_mut(k).zip(sums) {
        for (value, sum) in row.iter_mut().zip(sums) {
            *value += sum;
        }
    }
}

/// `sums = x^T y` over one panel; both slices go on for `OVERREAD` elements after the last row.
fn panel(
    level: Isa,
    x: &[f32],
    y: &[f32],
    rows: usize,
    k: usize,
    lower: bool,
    sums: &mut [[f32; NARROW]; NARROW],
) {
    assert!(level <= isa(), "this machine lacks {}", level.name());
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level <= isa()`, and `isa()` found these features on this machine.
        Isa::Avx512 => unsafe { panel_avx512(x, y, rows, k, lower, sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { panel_avx2(x, y, rows, k, lower, sums) },
        _ => panel_baseline(x, y, rows, k, lower, sums),
    }
}

/// Rows `first..first + HEIGHT` of the sums, `VECTORS` vectors of columns wide.
#[inline(always)]
fn strip<V: Lanes, const HEIGHT: usize, const VECTORS: usize>(
    x: &[f32],
    y: &[f32],
    rows: usize,
    k: usize,
    first: usize,
    sums: &mut [[f32; NARROW]; NARROW],
) {
    let mut acc = [[V::splat(0.0); VECTORS]; HEIGHT];
    for (left, right) in x[first..].windows(HEIGHT).step_by(k).zip(y.windows(NARROW).step_by(k)).take(rows) {
        let right: [V; VECTORS] = std::array::from_fn(|vector| {
            V::load(right[vector * LANES..].first_chunk().expect("a window holds two vectors"))
        });
        for i in 0..HEIGHT {
            let left = V::splat(left[i]);
            for vector in 0..VECTORS {
                acc[i][vector] = left.fma(right[vector], acc[i][vector]);
            }
        }
    }
    for (sums, acc) in sums[first..].iter_mut().zip(&acc) {
        for (sum, acc) in sums.as_chunks_mut::<LANES>().0.iter_mut().zip(acc) {
            acc.store(sum);
        }
    }
}

/// All strips of a panel. A strip on or above the diagonal's first vector needs one vector of columns only.
#[inline(always)]
fn strips<V: Lanes>(
    x: &[f32],
    y: &[f32],
    rows: usize,
    k: usize,
    lower: bool,
    sums: &mut [[f32; NARROW]; NARROW],
) {
    let mut first = 0;
    while first < k {
        let height = if k - first > 8 {
            12
        } else if k - first > 4 {
            8
        } else {
            4
        };
        let last = if lower { k.min(first + height) } else { k };
        match (height, last > LANES) {
            (12, false) => strip::<V, 12, 1>(x, y, rows, k, first, sums),
            (12, true) => strip::<V, 12, 2>(x, y, rows, k, first, sums),
            (8, false) => strip::<V, 8, 1>(x, y, rows, k, first, sums),
            (8, true) => strip::<V, 8, 2>(x, y, rows, k, first, sums),
            (_, false) => strip::<V, 4, 1>(x, y, rows, k, first, sums),
            (_, true) => strip::<V, 4, 2>(x, y, rows, k, first, sums),
        }
        first += height;
    }
}

/// Compiles `strips` for one level.
macro_rules! level {
    ($name:ident, $lanes:ty, #[$attribute:meta]) => {
        #[$attribute]
        fn $name(
            x: &[f32],
            y: &[f32],
            rows: usize,
            k: usize,
            lower: bool,
            sums: &mut [[f32; NARROW]; NARROW],
        ) {
            strips::<$lanes>(x, y, rows, k, lower, sums);
        }
    };
}

#[cfg(target_arch = "x86_64")]
level!(panel_avx512, Avx512, #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2,fma")]);
#[cfg(target_arch = "x86_64")]
level!(panel_avx2, Avx2, #[target_feature(enable = "avx2,fma")]);
level!(panel_baseline, Plain, #[inline(never)]);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::available;
    use crate::random::Stream;

    fn uniform(seed: u64, len: usize) -> Vec<f32> {
        let mut stream = Stream::new(seed, 0, 0);
        (0..len).map(|_| stream.unit_f32() * 2.0 - 1.0).collect()
    }

    fn reference(x: &[f32], y: &[f32], n: usize, k: usize, i: usize, j: usize) -> f64 {
        (0..n).map(|row| f64::from(x[row * k + i]) * f64::from(y[row * k + j])).sum()
    }

    /// Eight units in the last place of the largest sum expected (the mean square of an entry is 1/3): a slab is summed in
    /// sequence, so errors walk at random over up to 512 roundings.
    fn tolerance(n: usize) -> f64 {
        8.0 * f64::from(f32::EPSILON) * (n as f64 / 3.0).max(1.0)
    }

    const SHAPES: [(usize, usize); 16] = [
        (1, 1),
        (3, 1),
        (200, 2),
        (127, 9),
        (128, 9),
        (129, 9),
        (1000, 13),
        (300, 16),
        (257, 17),
        (130, 25),
        (61, 31),
        (500, 32),
        (77, 33),
        (40, 129),
        (700, 200),
        (5, 300),
    ];

    #[test]
    fn threads_mirror_what_one_mirrors() {
        for (k, threads) in [(1024, 2), (1031, 3), (1100, 5), (1057, 16), (40, 4)] {
            let whole: Vec<f32> = (0..k * k).map(|index| index as f32).collect();
            let (mut one, mut many) = (whole.clone(), whole);
            mirror_lower(&mut one, k);
            mirror_lower_by(&mut many, k, threads);
            assert!(one == many, "{k} by {threads}");
        }
    }

    #[test]
    fn lower_triangle_then_mirror_is_the_gram_matrix() {
        for (n, k) in SHAPES {
            let x = uniform(1, n * k);
            let mut g = vec![0.5; k * k];
            gram_lower(&x, n, k, &mut g);
            mirror_lower(&mut g, k);
            for i in 0..k {
                for j in 0..k {
                    let want = 0.5 + reference(&x, &x, n, k, i, j);
                    let got = f64::from(g[i * k + j]);
                    assert!(
                        (got - want).abs() <= tolerance(n),
                        "[{n}, {k}] at {i}, {j}: {got}, expected {want}"
                    );
                    assert_eq!(g[i * k + j], g[j * k + i]);
                }
            }
        }
    }

    #[test]
    fn cross_gram_has_the_first_operand_in_rows() {
        for (n, k) in SHAPES {
            let (x, y) = (uniform(2, n * k), uniform(3, n * k));
            let mut c = vec![0.0; k * k];
            cross_gram(&x, &y, n, k, &mut c);
            for i in 0..k {
                for j in 0..k {
                    let want = reference(&x, &y, n, k, i, j);
                    assert!((f64::from(c[i * k + j]) - want).abs() <= tolerance(n), "[{n}, {k}] at {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn narrow_kernel_is_right_at_every_level_this_machine_has() {
        for level in available() {
            for (n, k) in SHAPES.into_iter().filter(|(_, k)| *k <= NARROW) {
                let (x, y) = (uniform(4, n * k), uniform(5, n * k));
                let mut c = vec![0.0; k * k];
                narrow(level, &x, &y, n, k, false, &mut c);
                for (index, got) in c.iter().enumerate() {
                    let want = reference(&x, &y, n, k, index / k, index % k);
                    assert!(
                        (f64::from(*got) - want).abs() <= tolerance(n),
                        "{level:?} [{n}, {k}] at {index}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_bad_sample_after_the_last_does_not_leak_in() {
        let k = 9;
        let mut x = uniform(6, 300 * k);
        x[140 * k..].fill(f32::NAN);
        let mut g = vec![0.0; k * k];
        gram_lower(&x, 140, k, &mut g);
        assert!(g.iter().all(|v| v.is_finite()));
    }

    #[test]
    fn no_samples_add_nothing() {
        for k in [0, 9, 40] {
            let mut g = vec![0.25; k * k];
            gram_lower(&[], 0, k, &mut g);
            cross_gram(&[], &[], 0, k, &mut g);
            assert!(g.iter().all(|v| *v == 0.25));
        }
    }

    #[test]
    #[should_panic(expected = "gram: expected [4, 3] samples")]
    fn short_samples_are_refused() {
        gram_lower(&[0.0; 11], 4, 3, &mut [0.0; 9]);
    }
}
