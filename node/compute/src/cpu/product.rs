//! Dense f32 products on row-major slices, through the `gemm` crate, on the calling thread.
//!
//! The depth is split into slabs first, so that the order of summation depends on the shape alone.
//!
//! Not here: Gram matrices (`gram`).
#![expect(unsafe_code, reason = "gemm takes raw pointers; shapes are checked in `multiply`")]

use std::ops::Range;

use crate::device::Product;

/// Depth of the product done in one go. `gemm` itself splits the depth by the cache sizes it finds, but never below 512:
/// splitting here first makes the summation order, hence the bits, independent of the machine's caches.
pub(crate) const SLAB: usize = 512;

/// `0..len` in the least number of nearly equal ranges of at most `limit`.
pub(crate) fn slabs(len: usize, limit: usize) -> impl Iterator<Item = Range<usize>> {
    let size = len.div_ceil(len.div_ceil(limit).max(1)).max(1);
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}

/// A row-major matrix in memory, used as it is or transposed.
#[derive(Debug, Clone, Copy)]
pub struct Stored<'a> {
    /// The elements, from the first.
    pub data: &'a [f32],
    /// Elements from one stored row to the next.
    pub stride: usize,
    /// Use it transposed.
    pub transposed: bool,
}

/// Whether `rows` by `cols` with that row stride lies within `len` elements.
fn fits(len: usize, rows: usize, cols: usize, stride: usize) -> bool {
    if rows == 0 || cols == 0 {
        return true;
    }
    if rows > 1 && stride < cols {
        return false;
    }
    (rows - 1).checked_mul(stride).and_then(|n| n.checked_add(cols)).is_some_and(|n| n <= len)
}

impl Stored<'_> {
    /// The operand without its first `columns` columns; `columns` is less than it has.
    fn skip_columns(self, columns: usize) -> Self {
        Self { data: &self.data[if self.transposed { columns * self.stride } else { columns }..], ..self }
    }

    /// The operand without its first `rows` rows; `rows` is less than it has.
    fn skip_rows(self, rows: usize) -> Self {
        self.flipped().skip_columns(rows).flipped()
    }

    fn flipped(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn fits(&self, rows: usize, cols: usize) -> bool {
        let (rows, cols) = if self.transposed { (cols, rows) } else { (rows, cols) };
        fits(self.data.len(), rows, cols, self.stride)
    }

    /// Column stride, row stride, in elements.
    fn strides(&self) -> (isize, isize) {
        if self.transposed { (self.stride as isize, 1) } else { (1, self.stride as isize) }
    }
}

/// `out = alpha * a * b + beta * out`; with `beta == 0`, `out` is overwritten without being read.
///
/// # Panics
/// If an operand does not hold its shape.
pub fn multiply(product: Product, a: Stored<'_>, b: Stored<'_>, out: &mut [f32], out_stride: usize) {
    let Product { m, n, k, beta, .. } = product;
    assert!(a.fits(m, k), "a: expected [{m}, {k}], stride {}, actual {} elements", a.stride, a.data.len());
    assert!(b.fits(k, n), "b: expected [{k}, {n}], stride {}, actual {} elements", b.stride, b.data.len());
    assert!(
        fits(out.len(), m, n, out_stride),
        "out: expected [{m}, {n}], stride {out_stride}, actual {} elements",
        out.len()
    );
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        return scale(m, n, beta, out, out_stride);
    }
    for (index, depth) in slabs(k, SLAB).enumerate() {
        let slab = Product { k: depth.len(), beta: if index == 0 { beta } else { 1.0 }, ..product };
        call(slab, a.skip_columns(depth.start), b.skip_rows(depth.start), out, out_stride);
    }
}

/// What a product of depth 0 leaves: `out = beta * out`.
fn scale(m: usize, n: usize, beta: f32, out: &mut [f32], out_stride: usize) {
    for row in 0..m {
        for value in &mut out[row * out_stride..][..n] {
            *value = if beta == 0.0 { 0.0 } else { beta * *value };
        }
    }
}

/// One call of gemm; the shapes fit and none is 0.
fn call(product: Product, a: Stored<'_>, b: Stored<'_>, out: &mut [f32], out_stride: usize) {
    let Product { m, n, k, alpha, beta } = product;
    debug_assert!(a.fits(m, k) && b.fits(k, n) && fits(out.len(), m, n, out_stride));
    let (a_cs, a_rs) = a.strides();
    let (b_cs, b_rs) = b.strides();
    // SAFETY: `multiply` checked that every element gemm addresses with these strides lies inside its slice, and a slab
    // of the depth is a part of the whole; `out` is borrowed mutably, so it aliases neither input.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a_cs,
            a_rs,
            b.data.as_ptr(),
            b_cs,
            b_rs,
            // gemm's `alpha` multiplies what `dst` held, its `beta` the product.
            beta,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `out = a[m, k] * b[k, n]`, row-major, for a `b` that is nowhere whole: `rows(range, slab)` is asked for some of its rows at a
/// time, `n` values each. The sums are, bit for bit, those of [`matmul`] with the whole.
///
/// # Panics
/// If a slice does not hold its shape.
pub fn matmul_made(
    (m, n, k): (usize, usize, usize),
    a: &[f32],
    mut rows: impl FnMut(Range<usize>, &mut [f32]),
    out: &mut [f32],
) {
    if k == 0 {
        return scale(m, n, 0.0, out, n);
    }
    let mut slab = vec![0.0; SLAB.min(k) * n];
    for (index, depth) in slabs(k, SLAB).enumerate() {
        let (beta, slab) = (if index == 0 { 0.0 } else { 1.0 }, &mut slab[..depth.len() * n]);
        rows(depth.clone(), slab);
        matmul(m, n, depth.len(), 1.0, &a[depth.start..], k, slab, n, beta, out, n);
    }
}

/// `out[m, n] = alpha * a[m, k] * b[k, n] + beta * out`, row-major, `lda`, `ldb`, `ldo` elements from row to row.
///
/// # Panics
/// If a slice does not hold its shape.
#[expect(clippy::too_many_arguments, reason = "the BLAS argument list, known to every reader")]
pub fn matmul(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    beta: f32,
    out: &mut [f32],
    ldo: usize,
) {
    let a = Stored { data: a, stride: lda, transposed: false };
    let b = Stored { data: b, stride: ldb, transposed: false };
    multiply(Product { m, n, k, alpha, beta }, a, b, out, ldo);
}

/// `out[m, n] = alpha * a^T * b[k, n] + beta * out`, `a` stored as `[k, m]`.
///
/// # Panics
/// If a slice does not hold its shape.
#[expect(clippy::too_many_arguments, reason = "the BLAS argument list, known to every reader")]
pub fn matmul_tn(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    beta: f32,
    out: &mut [f32],
    ldo: usize,
) {
    let a = Stored { data: a, stride: lda, transposed: true };
    let b = Stored { data: b, stride: ldb, transposed: false };
    multiply(Product { m, n, k, alpha, beta }, a, b, out, ldo);
}

/// `out[m, n] = alpha * a[m, k] * b^T + beta * out`, `b` stored as `[n, k]`.
///
/// # Panics
/// If a slice does not hold its shape.
#[expect(clippy::too_many_arguments, reason = "the BLAS argument list, known to every reader")]
pub fn matmul_nt(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    beta: f32,
    out: &mut [f32],
    ldo: usize,
) {
    let a = Stored { data: a, stride: lda, transposed: false };
    let b = Stored { data: b, stride: ldb, transposed: true };
    multiply(Product { m, n, k, alpha, beta }, a, b, out, ldo);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    fn uniform(stream: &mut Stream, len: usize) -> Vec<f32> {
        (0..len).map(|_| stream.unit_f32() * 2.0 - 1.0).collect()
    }

    fn at(matrix: &Stored<'_>, row: usize, column: usize) -> f64 {
        let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
        f64::from(matrix.data[row * matrix.stride + column])
    }

    /// Compares with the definition in f64; the columns between `n` and the stride must stay as they were.
    fn check(m: usize, n: usize, k: usize, alpha: f32, beta: f32, transposed: [bool; 2], pad: usize) {
        let mut stream = Stream::new(1, (m * 1000 + n) as u64, k as u32);
        let stride = |columns: usize| columns + pad;
        let [a_stride, b_stride] =
            [stride(if transposed[0] { m } else { k }), stride(if transposed[1] { k } else { n })];
        let (a, b) = (uniform(&mut stream, m.max(k) * a_stride), uniform(&mut stream, n.max(k) * b_stride));
        let a = Stored { data: &a, stride: a_stride, transposed: transposed[0] };
        let b = Stored { data: &b, stride: b_stride, transposed: transposed[1] };
        let before = uniform(&mut stream, m * stride(n));
        let mut out = before.clone();
        multiply(Product { m, n, k, alpha, beta }, a, b, &mut out, stride(n));
        for (index, (got, before)) in out.iter().zip(&before).enumerate() {
            let (row, column) = (index / stride(n), index % stride(n));
            if column >= n {
                assert_eq!(got, before, "padding of row {row}");
                continue;
            }
            let sum: f64 = (0..k).map(|i| at(&a, row, i) * at(&b, i, column)).sum();
            let want = f64::from(alpha) * sum + f64::from(beta) * f64::from(*before);
            // f32 sums of k terms below 1, split into slabs.
            let tolerance = 1e-6 * (k as f64 + 2.0).sqrt() * 2.0;
            let shape = format!("[{m}, {k}] x [{k}, {n}], {transposed:?}, alpha {alpha}, beta {beta}");
            assert!(
                (f64::from(*got) - want).abs() <= tolerance,
                "{shape} at {row}, {column}: {got}, expected {want}"
            );
        }
    }

    #[test]
    fn a_matrix_made_row_by_row_gives_the_bits_of_the_whole() {
        for (m, n, k) in [(3, 5, 1), (7, 33, 511), (16, 64, 512), (5, 40, 513), (33, 96, 1300)] {
            let mut stream = Stream::new(2, n as u64, k as u32);
            let (a, b) = (uniform(&mut stream, m * k), uniform(&mut stream, k * n));
            let (mut want, mut got) = (vec![0.0; m * n], vec![f32::NAN; m * n]);
            matmul(m, n, k, 1.0, &a, k, &b, n, 0.0, &mut want, n);
            let rows = |rows: Range<usize>, slab: &mut [f32]| {
                slab.copy_from_slice(&b[rows.start * n..rows.end * n]);
            };
            matmul_made((m, n, k), &a, rows, &mut got);
            assert_eq!(want, got, "[{m}, {k}] x [{k}, {n}]");
        }
    }

    #[test]
    fn products_match_their_definition_at_awkward_shapes() {
        for (m, n, k) in [
            (1, 1, 1),
            (1, 7, 13),
            (7, 1, 13),
            (5, 17, 2),
            (16, 16, 16),
            (33, 31, 129),
            (3, 5, 511),
            (4, 9, 513),
            (17, 2, 1537),
        ] {
            for transposed in [[false, false], [true, false], [false, true], [true, true]] {
                check(m, n, k, 1.0, 0.0, transposed, 0);
                check(m, n, k, -0.5, 2.0, transposed, 3);
            }
        }
    }

    #[test]
    fn depth_zero_scales_the_result() {
        check(3, 4, 0, 1.0, 0.0, [false, false], 1);
        check(3, 4, 0, 1.0, 0.5, [false, false], 1);
    }

    #[test]
    fn beta_zero_ignores_what_the_result_held() {
        let mut out = [f32::NAN; 4];
        matmul(2, 2, 600, 1.0, &[1.0; 1200], 600, &[1.0; 1200], 2, 0.0, &mut out, 2);
        assert_eq!(out, [600.0; 4]);
    }

    #[test]
    fn the_three_entry_points_mean_what_they_say() {
        // [[1, 2], [3, 4]] and [[5, 6], [7, 8]].
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]);
        let mut out = [0.0; 4];
        matmul(2, 2, 2, 1.0, &a, 2, &b, 2, 0.0, &mut out, 2);
        assert_eq!(out, [19.0, 22.0, 43.0, 50.0]);
        matmul_tn(2, 2, 2, 1.0, &a, 2, &b, 2, 0.0, &mut out, 2);
        assert_eq!(out, [26.0, 30.0, 38.0, 44.0]);
        matmul_nt(2, 2, 2, 1.0, &a, 2, &b, 2, 0.0, &mut out, 2);
        assert_eq!(out, [17.0, 23.0, 39.0, 53.0]);
    }

    #[test]
    fn slabs_cover_the_range_in_order_within_the_limit() {
        for len in [0, 1, 511, 512, 513, 576, 1024, 1025, 5000] {
            let all: Vec<_> = slabs(len, SLAB).collect();
            assert_eq!(all.iter().map(Range::len).sum::<usize>(), len);
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start), "{all:?}");
            assert!(all.iter().all(|slab| slab.len() <= SLAB && !slab.is_empty()), "{all:?}");
            assert_eq!(all.len(), len.div_ceil(SLAB), "{all:?}");
        }
    }

    #[test]
    #[should_panic(expected = "b: expected [3, 2]")]
    fn short_operands_are_refused_before_gemm_sees_them() {
        matmul(2, 2, 3, 1.0, &[0.0; 6], 3, &[0.0; 5], 2, 0.0, &mut [0.0; 4], 2);
    }

    #[test]
    #[should_panic(expected = "out: expected")]
    fn overlapping_rows_are_refused() {
        matmul(2, 2, 1, 1.0, &[0.0; 2], 1, &[0.0; 2], 2, 0.0, &mut [0.0; 4], 1);
    }
}
