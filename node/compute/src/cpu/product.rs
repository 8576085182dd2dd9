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
    fn from_column(self, columns: usize) -> Self {
        Self { data: &self.data[if self.transposed { columns * self.stride } else { columns }..], ..self }
    }

    /// The operand without its first `rows` rows; `rows` is less than it has.
    fn from_row(self, rows: usize) -> Self {
        self.flipped().from_column(rows).flipped()
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
    assert!(fits(out.len(), m, n, out_stride), "out: expected [{m}, {n}], stride {out_stride}, actual {} elements", out.len());
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        return scale(m, n, beta, out, out_stride);
    }
    for (index, depth) in slabs(k, SLAB).enumerate() {
        let slab = Product { k: depth.len(), beta: if index == 0 { beta } else { 1.0 }, ..product };
        call(slab, a.from_column(depth.start), b.from_row(depth.start), out, out_stride);
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

/// `out[m, n] = alpha * a[m, k] * b[k, n] + beta * out`, row-major, `lda`, `ldb`, `ldo` elements from row to row.
///
/// # Panics
/// If a slice does not hold its shape.
#[expect(clippy::too_many_arguments, reason = "the BLAS argument list, known to every reader")]
pub fn matmul(m: usize, n: usize, k: usize, alpha: f32, a: &[f32], lda: usize, b: &[f32], ldb: usize, beta: f32, out: &mut [f32], ldo: usize) {
    let a = Stored { data: a, stride: lda, transposed: false };
    let b = Stored { data: b, stride: ldb, transposed: false };
    multiply(Product { m, n, k, alpha, beta }, a, b, out, ldo);
}

/// `out[m, n] = alpha * a^T * b[k, n] + beta * out`, `a` stored as `[k, m]`.
///
/// # Panics
/// If a slice does not hold its shape.
#[expect(clippy::too_many_arguments, reason = "the BLAS argument list, known to every reader")]
pub fn matmul_tn(m: usize, n: usize, k: usize, alpha: f32, a: &[f32], lda: usize, b: &[f32], ldb: usize, beta: f32, out: &mut [f32], ldo: usize) {
    let a = Stored { data: a, stride: lda, transposed: true };
    let b = Stored { data: b, stride: ldb, transposed: false };
    multiply(Product { m, n, k, alpha, beta }, a, b, out, ldo);
}

/// `out[m, n] = alpha * a[m, k] * b^T + beta * out`, `b` stored as `[n, k]`.
///
/// # Panics
/// If a slice does not hold its shape.
#[expect(clippy::too_many_arguments, reason = "the BLAS argument list, known to every reader")]
pub fn matmul_nt(m: usize, n: usize, k: usize, alpha: f32, a: &[f32], lda: usize, b: &[f32], ldb: usize, beta: f32, out: &mut [f32], ldo: usize) {
    let a = Stored { data: a, stride: lda, transposed: false };
    let b = Stored { data: b, stride: ldb, transposed: true };
    multiply(Product { m, n, k, alpha, beta }, a, b, out, ldo);
}
