//! What a solve makes of second moments besides plain products: products with the difference of two, comparisons in f64,
//! normal equations of scales.
//!
//! Twins of `cu/moments.cu` and `cu/dots.cu`. Matrices are `[cols, cols]`, row-major.
//! Not here: what the numbers mean (`solver`).

use super::{add_product_f64, matmul, matmul_made};

/// Rows of a matrix that are made f64 at a time.
const SLAB: usize = 64;

/// `w (plus - minus)`, `w` and the result `[rows, cols]`; the difference is never there as a whole.
///
/// # Panics
/// If a slice does not hold its shape.
pub fn multiply_moments(
    rows: usize,
    cols: usize,
    w: &[f32],
    plus: &[f32],
    minus: Option<&[f32]>,
    out: &mut [f32],
) {
    if rows == 0 || cols == 0 {
        return;
    }
    let Some(minus) = minus else {
        return matmul(rows, cols, cols, 1.0, w, cols, plus, cols, 0.0, out, cols);
    };
    let difference = |lines: std::ops::Range<usize>, slab: &mut [f32]| {
        let part = lines.start * cols..lines.end * cols;
        let entries = plus[part.clone()].iter().zip(&minus[part]);
        slab.iter_mut().zip(entries).for_each(|(value, (plus, minus))| *value = plus - minus);
    };
    matmul_made((rows, cols, cols), w, difference, out);
}

/// `(a - b) . ((a + b) h + 2 w (h - c))` of each row, in f64 throughout: by how much `e h e' + 2 w (h - c) e'` at `e = a` exceeds
/// that at `b`, `h` being symmetric. Nothing if there are no columns. `a`, `b`, `w`: `[rows, cols]`; without `gap` (`w` and `c`), `h - c` is 0.
///
/// # Panics
/// If a slice does not hold its shape.
pub fn exact_differences(
    rows: usize,
    cols: usize,
    (a, b): (&[f32], &[f32]),
    h: &[f32],
    gap: Option<(&[f32], &[f32])>,
) -> Vec<f64> {
    if rows == 0 || cols == 0 {
        return Vec::new();
    }
    let wide = |values: &[f32]| -> Vec<f64> { values.iter().copied().map(f64::from).collect() };
    let both = |sign: f64| a.iter().zip(b).map(move |(a, b)| f64::from(*a) + sign * f64::from(*b));
    let (sum, weights) = (both(1.0).collect::<Vec<f64>>(), gap.map(|(w, _)| wide(w)));
    let mut slope = vec![0.0; rows * cols];
    let mut gap_slab = vec![0.0; if gap.is_some() { SLAB * cols } else { 0 }];
    for start in (0..cols).step_by(SLAB) {
        let depth = SLAB.min(cols - start);
        let part = start * cols..(start + depth) * cols;
        let h = wide(&h[part.clone()]);
        add_product_f64(rows, cols, depth, 1.0, &sum[start..], cols, &h, cols, &mut slope, cols);
        if let (Some((_, c)), Some(weights)) = (gap, &weights) {
            let entries = h.iter().zip(&c[part]);
            gap_slab.iter_mut().zip(entries).for_each(|(to, (h, c))| *to = h - f64::from(*c));
            add_product_f64(
                rows,
                cols,
                depth,
                2.0,
                &weights[start..],
                cols,
                &gap_slab,
                cols,
                &mut slope,
                cols,
            );
        }
    }
    let difference: Vec<f64> = both(-1.0).collect();
    let dot = |(a, b): (&[f64], &[f64])| a.iter().zip(b).map(|(a, b)| a * b).sum();
    difference.chunks_exact(cols).zip(slope.chunks_exact(cols)).map(dot).collect()
}

/// Sums of `(a - b)^2` down the columns, and whether any entry differs.
///
/// # Panics
/// If a slice does not hold its shape.
pub fn column_gaps(cols: usize, a: &[f32], b: &[f32]) -> (Vec<f32>, bool) {
    let (mut squares, mut differ) = (vec![0.0f32; cols], false);
    for (a, b) in a.chunks_exact(cols.max(1)).zip(b.chunks_exact(cols.max(1))) {
        squares.iter_mut().zip(a).zip(b).for_each(|((square, a), b)| {
            *square += (a - b) * (a - b);
            differ |= a - b != 0.0;
        });
    }
    (squares, differ)
}

/// `k_g h k_g'` of each row, lower triangles of `[rows, groups, groups]`: f32 products, their sums with the levels in f64. `levels`
/// and `scratch`: `[rows, cols]`, groups of `width` columns.
///
/// # Panics
/// If a slice does not hold its shape.
pub fn normal_equations(
    (rows, cols, width): (usize, usize, usize),
    levels: &[f32],
    h: &[f32],
    scratch: &mut [f32],
) -> Vec<f64> {
    let width = width.clamp(1, cols.max(1));
    let groups = cols.div_ceil(width);
    let mut normal = vec![0.0; rows * groups * groups];
    if rows == 0 {
        return normal;
    }
    for group in 0..groups {
        let start = group * width;
        let end = cols.min(start + width);
        // The triangle needs columns up to this group's end.
        let (left, right) = (&levels[start..], &h[start * cols..]);
        matmul(rows, end, end - start, 1.0, left, cols, right, cols, 0.0, scratch, end);
        let lines = scratch.chunks_exact(end).zip(levels.chunks_exact(cols)).take(rows);
        for (row, (product, levels)) in lines.enumerate() {
            let line = &mut normal[(row * groups + group) * groups..][..=group];
            for ((product, level), entry) in product.chunks(width).zip(levels[..end].chunks(width)).zip(line)
            {
                *entry = product.iter().zip(level).map(|(p, k)| f64::from(*p) * f64::from(*k)).sum();
            }
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    fn uniform(stream: &mut Stream, len: usize) -> Vec<f32> {
        (0..len).map(|_| stream.unit_f32() - 0.5).collect()
    }

    #[test]
    fn products_with_differences_and_exact_comparisons_are_those_of_the_definition() {
        for (rows, cols) in [(1, 1), (3, 5), (2, 64), (5, 131)] {
            let mut stream = Stream::new(4, rows as u64, cols as u32);
            let [a, b, w] = [(); 3].map(|()| uniform(&mut stream, rows * cols));
            let [mut h, c] = [(); 2].map(|()| uniform(&mut stream, cols * cols));
            super::super::mirror_lower(&mut h, cols);
            let mut product = vec![f32::NAN; rows * cols];
            multiply_moments(rows, cols, &w, &h, Some(&c), &mut product);
            let gaps = exact_differences(rows, cols, (&a, &b), &h, Some((&w, &c)));
            let plain = exact_differences(rows, cols, (&a, &b), &h, None);
            for row in 0..rows {
                let at = |values: &[f32], col: usize| f64::from(values[row * cols + col]);
                let value = |e: &[f32], linear: f64| -> f64 {
                    let term = |i: usize, j: usize| {
                        let (h, c) = (f64::from(h[i * cols + j]), f64::from(c[i * cols + j]));
                        (at(e, i) * h + linear * at(&w, i) * (h - c)) * at(e, j)
                    };
                    (0..cols * cols).map(|index| term(index / cols, index % cols)).sum()
                };
                for (got, linear) in [(gaps[row], 2.0), (plain[row], 0.0)] {
                    let want = value(&a, linear) - value(&b, linear);
                    assert!((got - want).abs() < 1e-12 * (cols * cols) as f64, "row {row}: {got} for {want}");
                }
                for col in 0..cols {
                    let term = |i: usize| at(&w, i) * f64::from(h[i * cols + col] - c[i * cols + col]);
                    let want: f64 = (0..cols).map(term).sum();
                    assert!((at(&product, col) - want).abs() < 1e-6 * cols as f64, "[{row}, {col}]");
                }
            }
        }
    }

    #[test]
    fn columns_that_differ_too_little_for_a_square_differ() {
        let a = [1.0, 0.0, 3.0, 0.0];
        assert_eq!(column_gaps(2, &a, &a), (vec![0.0; 2], false));
        assert_eq!(column_gaps(2, &a, &[1.0, 1e-30, 3.0, 0.0]), (vec![0.0; 2], true));
        assert_eq!(column_gaps(2, &a, &[0.0, 0.0, 1.0, 2.0]), (vec![5.0, 4.0], true));
    }
}
