//! One block of a triangular factor, and one block of Babai's nearest plane: what lies between products.
//!
//! Plain loops: they say what a GPU's kernels compute. The solver's own CPU path (`solver::gptq`) substitutes instead of
//! multiplying by inverses, which one core does as fast and with less rounding.
//! Not here: the products between blocks, the order of columns.

use std::ops::Range;

/// Columns of a block, at most.
pub const PLANE_BLOCK: usize = 64;

/// The lower factor `L` of a diagonal block, `L L' = block + extra I`, and its inverse, found in f64.
///
/// `a`, `lower`: `[n, n]`, of which rows and columns `block`, lower triangle. `inverses`: `[n, 64]`, rows `block`, the first
/// `block.len()` columns. A block that is not positive definite gives NaN from the column where that shows.
///
/// # Panics
/// If an array is shorter, or the block longer than [`PLANE_BLOCK`] or not inside `n`.
pub fn factor_block(
    n: usize,
    block: Range<usize>,
    extra: f32,
    a: &[f32],
    lower: &mut [f32],
    inverses: &mut [f32],
) {
    let (start, width) = (block.start, block.len());
    assert!(width <= PLANE_BLOCK && block.end <= n, "block {block:?} of {n}");
    let mut tile = [[0.0f64; PLANE_BLOCK]; PLANE_BLOCK];
    for i in 0..width {
        for j in 0..=i {
            let mut value = f64::from(a[(start + i) * n + start + j]);
            if i == j {
                value += f64::from(extra);
            }
            value = (0..j).fold(value, |value, k| (-tile[i][k]).mul_add(tile[j][k], value));
            tile[i][j] = match i == j {
                true if value > 0.0 && value < 1.0e300 => value.sqrt(),
                true => f64::NAN,
                false => value / tile[j][j],
            };
            lower[(start + i) * n + start + j] = tile[i][j] as f32;
        }
    }
    for j in 0..width {
        let mut column = [0.0f64; PLANE_BLOCK];
        for i in j..width {
            let unit = if i == j { 1.0 } else { 0.0 };
            let value = (j..i).fold(unit, |value, k| (-tile[i][k]).mul_add(column[k], value));
            column[i] = value / tile[i][i];
        }
        (0..width).for_each(|i| inverses[(start + i) * PLANE_BLOCK + j] = column[i] as f32);
    }
}

/// The choices of one block of columns, last column first.
///
/// Column `j` of a row takes the neighbour, `low` or `low + delta`, whose error makes `offset[j] + factor[j, j] * error` smallest,
/// and adds its error times the factor's row to the offsets of the block's earlier columns (not stored). `factor`: `[n, n]`, lower
/// triangle; all others `[rows, n]`. `up` (0 or 1) and `errors` are written inside the block.
///
/// # Panics
/// If an array is shorter, or the block longer than [`PLANE_BLOCK`] or not inside `n`.
pub fn plane_block(
    rows: usize,
    n: usize,
    block: Range<usize>,
    factor: &[f32],
    (low, delta, offset): (&[f32], &[f32], &[f32]),
    up: &mut [f32],
    errors: &mut [f32],
) {
    assert!(block.len() <= PLANE_BLOCK && block.end <= n, "block {block:?} of {n}");
    if block.is_empty() {
        return;
    }
    for row in 0..rows {
        let line = row * n..(row + 1) * n;
        let (low, delta) = (&low[line.clone()], &delta[line.clone()]);
        let (up, errors) = (&mut up[line.clone()], &mut errors[line.clone()]);
        let mut sums = [0.0f32; PLANE_BLOCK];
        sums[..block.len()].copy_from_slice(&offset[line][block.clone()]);
        for j in block.clone().rev() {
            let wanted = -sums[j - block.start] / factor[j * n + j];
            // The upper neighbour if it is closer to what would cancel the term.
            let above = wanted - low[j] >= 0.5 * delta[j] && delta[j] != 0.0;
            up[j] = if above { 1.0 } else { 0.0 };
            errors[j] = if above { low[j] + delta[j] } else { low[j] };
            let weights = &factor[j * n + block.start..j * n + j];
            sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum = weight.mul_add(errors[j], *sum));
        }
    }
}
