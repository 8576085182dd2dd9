//! The device interface.
//!
//! A row chunk's state (weights, rounding variables, moments, residuals) stays in [`Device::Buffer`]s for the whole
//! solve; the host sees it on `download`. Every method checks shapes and returns a [`DeviceError`]; none allocates
//! except `zeros`, `upload` and what is done with second moments (bounded, whatever their size).
//!
//! Not here: the devices (`cpu::device`, `cuda`), anything about AdaRound's schedule (`solver`).

use std::ops::Range;

use crate::activation::Activation;
use crate::cpu;
use crate::cpu::step::StepArgs;

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A buffer is shorter than the shape asks for, or a shape overflows.
    #[error("{operand}: buffer too short, expected at least {expected} elements, actual {actual}")]
    Length {
        /// Which operand.
        operand: &'static str,
        /// Elements the shape needs (`usize::MAX` if that overflows).
        expected: usize,
        /// Elements the buffer has.
        actual: usize,
    },
    /// A row stride is smaller than the row.
    #[error("{operand}: row stride {stride} is smaller than the row of {columns} elements")]
    Stride {
        /// Which operand.
        operand: &'static str,
        /// The stride given.
        stride: usize,
        /// Row length it has to cover.
        columns: usize,
    },
    /// An index or range lies outside its matrix.
    #[error("{operand}: index {index} out of range, expected less than {limit}")]
    Index {
        /// Which operand.
        operand: &'static str,
        /// The offending index.
        index: usize,
        /// Exclusive limit.
        limit: usize,
    },
    /// The device has no room; with less beside it, or another device, the same may succeed.
    #[error("{device}: out of memory, {asked} bytes asked for{}", left(*.free))]
    OutOfMemory {
        /// The device's description.
        device: String,
        /// Bytes that were asked for.
        asked: usize,
        /// Bytes that were free when it failed, where the device says so.
        free: Option<usize>,
    },
    /// The device or its driver failed.
    #[error("{device}: {reason}")]
    Failed {
        /// The device's description.
        device: String,
        /// What it said.
        reason: String,
    },
}

fn left(free: Option<usize>) -> String {
    free.map_or_else(String::new, |free| format!(", {free} free"))
}

/// A read-only matrix inside a buffer: row-major from `offset`, rows `stride` apart.
///
/// `transposed` says that the *stored* matrix is the transpose of the operand.
#[derive(Debug)]
pub struct MatRef<'a, B> {
    /// Where it is stored.
    pub buffer: &'a B,
    /// Elements before the first.
    pub offset: usize,
    /// Elements from one stored row to the next.
    pub stride: usize,
    /// Use the stored matrix transposed.
    pub transposed: bool,
}

impl<'a, B> MatRef<'a, B> {
    /// The matrix at the start of `buffer`, rows `stride` apart.
    pub fn new(buffer: &'a B, stride: usize) -> Self {
        Self { buffer, offset: 0, stride, transposed: false }
    }
    /// The stored matrix at the start of `buffer`, used transposed.
    pub fn transposed(buffer: &'a B, stride: usize) -> Self {
        Self { buffer, offset: 0, stride, transposed: true }
    }
    /// The same, starting `offset` elements into the buffer.
    #[must_use]
    pub fn at(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }
}

/// A matrix inside a buffer that is written.
#[derive(Debug)]
pub struct MatMut<'a, B> {
    /// Where it is stored.
    pub buffer: &'a mut B,
    /// Elements before the first.
    pub offset: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a, B> MatMut<'a, B> {
    /// The matrix at the start of `buffer`, rows `stride` apart.
    pub fn new(buffer: &'a mut B, stride: usize) -> Self {
        Self { buffer, offset: 0, stride }
    }
    /// The same, starting `offset` elements into the buffer.
    #[must_use]
    pub fn at(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }
}

/// `out[m, n] = alpha * a[m, k] * b[k, n] + beta * out`; with `beta == 0`, `out` is not read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Product {
    /// Rows of `a` and `out`.
    pub m: usize,
    /// Columns of `b` and `out`.
    pub n: usize,
    /// Columns of `a`, rows of `b`.
    pub k: usize,
    /// Factor on the product.
    pub alpha: f32,
    /// Factor on what `out` held.
    pub beta: f32,
}

impl Product {
    /// The plain product, `out = a * b`.
    pub fn new(m: usize, n: usize, k: usize) -> Self {
        Self { m, n, k, alpha: 1.0, beta: 0.0 }
    }
}

/// Where the step's data gradient comes from.
#[derive(Debug)]
pub enum StepGradient<'a, B> {
    /// Gram objective: `grad_scale * (product - target)`; both `[len]`.
    Difference {
        /// `W~ H`.
        product: &'a B,
        /// `W C`.
        target: &'a B,
    },
    /// Samples objective: `grad_scale * gradient`, `[len]`.
    Given {
        /// dL/dW~.
        gradient: &'a B,
    },
}

/// Everything one AdaRound iteration reads and writes, each `[len]`.
#[derive(Debug)]
pub struct StepBuffers<'a, B> {
    /// Elements (rows * columns of the chunk).
    pub len: usize,
    /// Data gradient with respect to the soft weights.
    pub gradient: StepGradient<'a, B>,
    /// Dequantized floor value.
    pub lo: &'a B,
    /// Scale; 0 where the weight is fixed.
    pub delta: &'a B,
    /// Rounding variables.
    pub v: &'a mut B,
    /// Adam's first moment.
    pub m1: &'a mut B,
    /// Adam's second moment.
    pub m2: &'a mut B,
    /// Receives `lo + delta * h(v)`.
    pub soft: &'a mut B,
}

/// H in the few digits that gradients need: `Q^-1 H Q^-1` in half precision; see [`cpu::scaled`].
#[derive(Debug)]
pub struct Steering<B> {
    /// H's side.
    pub(crate) cols: usize,
    /// `Q`: a power of two for every column, `[cols]`.
    pub(crate) scales: B,
    /// `[cols, cols]`, two numbers in each element.
    pub(crate) halves: B,
}

/// What AdaRound's iterations on a chunk work on, each `[rows, cols]`.
#[derive(Debug)]
pub struct LearnBuffers<'a, B> {
    /// Lower errors.
    pub lo: &'a B,
    /// Scale; 0 where the weight is fixed.
    pub delta: &'a B,
    /// Minus the linear term.
    pub target: &'a B,
    /// Rounding variables.
    pub v: &'a mut B,
    /// Adam's first moment.
    pub m1: &'a mut B,
    /// Adam's second moment.
    pub m2: &'a mut B,
    /// Soft errors `lo + delta * h(v)`; whether they follow is the device's affair.
    pub soft: &'a mut B,
    /// Scratch.
    pub product: &'a mut B,
}

/// Which part of which matrix a refinement step works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefineShape {
    /// Rows of the chunk.
    pub rows: usize,
    /// Columns of the chunk; also the side of `h`.
    pub cols: usize,
    /// Columns decided by this call.
    pub block: Range<usize>,
}

/// What an objective's sums are over: `[rows, cols]` each, and columns' weights `[cols]`.
#[derive(Debug)]
pub struct RowTerms<'a, B> {
    /// Errors of a rounding.
    pub errors: &'a B,
    /// Their product with H.
    pub product: &'a B,
    /// Minus the linear term.
    pub target: &'a B,
    /// Roots of the mean squares of the inputs.
    pub roots: &'a B,
    /// Norms of the columns of H - C.
    pub gaps: &'a B,
}

impl<B> Clone for RowTerms<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for RowTerms<'_, B> {}

/// What sweeps of coordinate descent did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Descent {
    /// How many there were, of the row that took most.
    pub sweeps: u32,
    /// Weights that flipped, all rows.
    pub flips: u64,
    /// Whether another sweep would flip nothing, of what is known.
    pub settled: bool,
}

/// What the nearest plane reads of a chunk, each `[rows, n]`.
#[derive(Debug)]
pub struct PlaneBuffers<'a, B> {
    /// The error of each weight's lower neighbour.
    pub low: &'a B,
    /// From there to the upper one; 0 where there is no choice.
    pub delta: &'a B,
    /// What the columns decided so far add to the others.
    pub offset: &'a B,
}

/// Second moments `[cols, cols]` whose diagonal, where the stored one is damped, is kept beside them.
#[derive(Debug)]
pub struct Moments<'a, B> {
    /// All entries; those of the diagonal are not read if there is another.
    pub matrix: &'a B,
    /// The diagonal meant, `[cols]`.
    pub diagonal: Option<&'a B>,
}

impl<B> Clone for Moments<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Moments<'_, B> {}

/// A device: memory of f32 and the few kernels the solver needs.
pub trait Device: Send + Sync {
    /// A device array of f32.
    type Buffer: Send + Sync;

    /// Whether its memory is the host's: then what is not a product is done on the host's slices.
    const IS_HOST: bool;

    /// Kind, model and level, for the manifest.
    fn describe(&self) -> String;

    /// A new buffer of `len` zeros.
    fn zeros(&self, len: usize) -> Result<Self::Buffer, DeviceError>;

    /// A new buffer with the host's values.
    fn upload(&self, host: &[f32]) -> Result<Self::Buffer, DeviceError>;

    /// The same of values that the host has no more use for: where its memory is the device's they are not copied.
    ///
    /// # Errors
    /// As [`Self::upload`].
    fn adopt(&self, host: Vec<f32>) -> Result<Self::Buffer, DeviceError> {
        self.upload(&host)
    }

    /// Lets other queues of the same device read `buffer` from now on; it is not written any more.
    ///
    /// # Errors
    /// `Failed` if what it waits for failed.
    fn share(&self, buffer: &mut Self::Buffer) -> Result<(), DeviceError> {
        let _ = buffer;
        Ok(())
    }

    /// Overwrites the start of `buffer`.
    fn write(&self, host: &[f32], buffer: &mut Self::Buffer) -> Result<(), DeviceError>;

    /// The first `len` values become 0.
    ///
    /// # Errors
    /// `Length`, `Failed`.
    fn clear(&self, len: usize, buffer: &mut Self::Buffer) -> Result<(), DeviceError>;

    /// Reads the first `host.len()` values of `buffer`.
    fn download(&self, buffer: &Self::Buffer, host: &mut [f32]) -> Result<(), DeviceError>;

    /// `out = alpha * a * b + beta * out`.
    fn matmul(
        &self,
        product: Product,
        a: MatRef<'_, Self::Buffer>,
        b: MatRef<'_, Self::Buffer>,
        out: MatMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// `matmul` where the result only steers a search, as a gradient does: a device may round the factors to fewer
    /// digits (TF32: 11 bits) where that is faster. Never for what is compared or reported.
    fn matmul_rough(
        &self,
        product: Product,
        a: MatRef<'_, Self::Buffer>,
        b: MatRef<'_, Self::Buffer>,
        out: MatMut<'_, Self::Buffer>,
    ) -> Result<(), DeviceError> {
        self.matmul(product, a, b, out)
    }

    /// `g += x^T x`, `x: [n, k]`, `g: [k, k]`, both triangles of `g` written (the upper copied from the lower).
    fn gram(&self, x: &Self::Buffer, n: usize, k: usize, g: &mut Self::Buffer) -> Result<(), DeviceError>;

    /// One fused AdaRound iteration; see [`cpu::adaround_step`].
    fn adaround_step(
        &self,
        args: &StepArgs,
        buffers: StepBuffers<'_, Self::Buffer>,
    ) -> Result<(), DeviceError>;

    /// H, `[cols, cols]`, as [`Self::learn`] multiplies by it if that is not H itself; `diagonal` is H's.
    ///
    /// # Errors
    /// `Length`, `OutOfMemory`, `Failed`.
    fn steering(
        &self,
        cols: usize,
        h: &Self::Buffer,
        diagonal: &[f32],
    ) -> Result<Option<Steering<Self::Buffer>>, DeviceError> {
        let _ = (cols, h, diagonal);
        Ok(None)
    }

    /// Iterations of AdaRound on a chunk `[rows, cols]`: for each of `steps` the product of the soft errors with H, or with what
    /// [`Self::steering`] made of it, then [`Self::adaround_step`].
    ///
    /// # Errors
    /// Those of its parts, `OutOfMemory`.
    fn learn(
        &self,
        (rows, cols): (usize, usize),
        h: &Self::Buffer,
        steering: Option<&Steering<Self::Buffer>>,
        buffers: LearnBuffers<'_, Self::Buffer>,
        steps: &mut dyn Iterator<Item = StepArgs>,
    ) -> Result<(), DeviceError> {
        debug_assert!(steering.is_none(), "a device that makes one reads it");
        learn(self, (rows, cols), h, buffers, steps)
    }

    /// One pass of coordinate descent over a block of columns; see [`cpu::refine_block`] for shapes.
    ///
    /// `residual` is only read; the caller then adds `flips[rows, block] * h[block, :]` to it (one product over all
    /// columns, block included).
    fn refine_block(
        &self,
        shape: &RefineShape,
        h: &Self::Buffer,
        residual: &Self::Buffer,
        delta: &Self::Buffer,
        up: &mut Self::Buffer,
        flips: &mut Self::Buffer,
    ) -> Result<u64, DeviceError>;

    /// One pass over all columns, block by block: [`Device::refine_block`], then its product added to `residual`; returns the
    /// number of flips. `flips` holds at least `rows` times the width of a block.
    ///
    /// # Errors
    /// Those of its parts.
    fn refine_sweep(
        &self,
        rows: usize,
        cols: usize,
        h: &Self::Buffer,
        residual: &mut Self::Buffer,
        delta: &Self::Buffer,
        up: &mut Self::Buffer,
        flips: &mut Self::Buffer,
    ) -> Result<u64, DeviceError> {
        let mut total = 0;
        for start in (0..cols).step_by(cpu::REFINE_BLOCK) {
            let shape = RefineShape { rows, cols, block: start..cols.min(start + cpu::REFINE_BLOCK) };
            let flipped = self.refine_block(&shape, h, residual, delta, up, flips)?;
            if flipped > 0 {
                carry_flips(self, &shape, h, flips, residual)?;
            }
            total += flipped;
        }
        Ok(total)
    }

    /// Coordinate descent over all columns, again and again: at least one sweep and at most `sweeps`, as many as are done best
    /// at once. `residual` follows the flips, `up` is updated; `flips` is scratch as for [`Device::refine_sweep`].
    ///
    /// # Errors
    /// Those of its parts.
    fn descend(
        &self,
        sweeps: u32,
        rows: usize,
        cols: usize,
        h: &Self::Buffer,
        residual: &mut Self::Buffer,
        delta: &Self::Buffer,
        up: &mut Self::Buffer,
        flips: &mut Self::Buffer,
    ) -> Result<Descent, DeviceError> {
        if sweeps == 0 {
            return Ok(Descent::default());
        }
        let flips = self.refine_sweep(rows, cols, h, residual, delta, up, flips)?;
        Ok(Descent { sweeps: 1, flips, settled: flips == 0 })
    }

    /// `a -= b`, the first `len` elements.
    fn subtract(&self, len: usize, a: &mut Self::Buffer, b: &Self::Buffer) -> Result<(), DeviceError>;

    /// `out = up * delta + low`, the first `len` elements: the errors of a rounding; see [`cpu::rounding_errors`].
    ///
    /// # Errors
    /// `Length`, `Failed`.
    fn rounding_errors(
        &self,
        len: usize,
        low: &Self::Buffer,
        delta: &Self::Buffer,
        up: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// The sums of each row that an objective is made of, in f64; see [`cpu::row_sums`].
    ///
    /// # Errors
    /// `Length`, `Failed`.
    fn row_sums(
        &self,
        rows: usize,
        cols: usize,
        terms: RowTerms<'_, Self::Buffer>,
    ) -> Result<Vec<[f64; 4]>, DeviceError>;

    /// `a . b` of each run of `width` columns of each row, `[rows, ceil(cols / width)]`, in f64; `a`, `b`: `[rows, cols]`. See
    /// [`cpu::run_dots`].
    ///
    /// # Errors
    /// `Length`, `Failed`.
    fn run_dots(
        &self,
        rows: usize,
        cols: usize,
        width: usize,
        a: &Self::Buffer,
        b: &Self::Buffer,
    ) -> Result<Vec<f64>, DeviceError>;

    /// `out[r, j] = source[r, j] * by[r]`, both `[by.len(), cols]`.
    ///
    /// # Errors
    /// `Length`, `Failed`.
    fn scale_rows(
        &self,
        cols: usize,
        by: &[f32],
        source: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Rows `indices` of `out: [_, cols]` become the same rows of `source`.
    ///
    /// # Errors
    /// `Length`, `Index`, `Failed`.
    fn copy_rows(
        &self,
        cols: usize,
        indices: &[u32],
        source: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Copies rows `indices` of `source: [_, k]` to `out: [indices.len(), k]`.
    fn gather_rows(
        &self,
        source: &Self::Buffer,
        k: usize,
        indices: &[u32],
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// `out[r, j] = source[r, order[j]]`, both `[rows, order.len()]`.
    fn gather_columns(
        &self,
        source: &Self::Buffer,
        rows: usize,
        order: &[u32],
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Factors a diagonal block of `a` (plus `extra` on its diagonal) into `lower`, both `[n, n]`; its inverse goes to `inverses`,
    /// `[n, PLANE_BLOCK]`. NaN if it is not positive definite. See [`cpu::factor_block`].
    fn factor_block(
        &self,
        n: usize,
        block: Range<usize>,
        extra: f32,
        a: &Self::Buffer,
        lower: &mut Self::Buffer,
        inverses: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Decides a block of columns in Babai's order; see [`cpu::plane_block`] for shapes.
    fn plane_block(
        &self,
        rows: usize,
        n: usize,
        block: Range<usize>,
        factor: &Self::Buffer,
        buffers: PlaneBuffers<'_, Self::Buffer>,
        up: &mut Self::Buffer,
        errors: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// `out = w (plus - minus)`, `w` and `out`: `[rows, cols]`; see [`cpu::multiply_moments`].
    fn multiply_moments(
        &self,
        rows: usize,
        cols: usize,
        w: &Self::Buffer,
        plus: Moments<'_, Self::Buffer>,
        minus: Option<&Self::Buffer>,
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// `(a - b) . ((a + b) h + 2 w (h - c))` of each row, all of it in f64; see [`cpu::exact_differences`].
    fn exact_differences(
        &self,
        rows: usize,
        cols: usize,
        errors: (&Self::Buffer, &Self::Buffer),
        h: Moments<'_, Self::Buffer>,
        gap: Option<(&Self::Buffer, &Self::Buffer)>,
    ) -> Result<Vec<f64>, DeviceError>;

    /// `k_g h k_g'` of each row, in f64 from f32 products, where `k_g` are the row's `levels` in group `g` of `width` columns:
    /// `[rows, groups, groups]`, of which the lower triangles mean something. See [`cpu::normal_equations`].
    fn normal_equations(
        &self,
        rows: usize,
        cols: usize,
        width: usize,
        levels: &Self::Buffer,
        h: &Self::Buffer,
        scratch: &mut Self::Buffer,
    ) -> Result<Vec<f64>, DeviceError>;

    /// Sums of `(a - b)^2` down the columns of two matrices `[cols, cols]`, and whether any entry differs.
    fn column_gaps(
        &self,
        cols: usize,
        a: &Self::Buffer,
        b: &Self::Buffer,
    ) -> Result<(Vec<f32>, bool), DeviceError>;

    /// Replaces the diagonal of a matrix `[n, n]`.
    fn set_diagonal(
        &self,
        n: usize,
        diagonal: &Self::Buffer,
        matrix: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Whether the first `len` values are finite.
    fn all_finite(&self, len: usize, values: &Self::Buffer) -> Result<bool, DeviceError>;

    /// In place `z = (f(z + bias) - target) * f'(z + bias)`, `z` and `target`: `[rows, cols]`.
    ///
    /// `activations` and `bias` have one entry per row; `activations` may have one entry for all rows and `bias`
    /// may be empty (zero).
    fn activation_residual(
        &self,
        activations: &[Activation],
        bias: &[f32],
        rows: usize,
        cols: usize,
        z: &mut Self::Buffer,
        target: &Self::Buffer,
    ) -> Result<(), DeviceError>;
}

/// Iterations of AdaRound by products with H itself.
pub(crate) fn learn<D: Device + ?Sized>(
    device: &D,
    (rows, cols): (usize, usize),
    h: &D::Buffer,
    buffers: LearnBuffers<'_, D::Buffer>,
    steps: &mut dyn Iterator<Item = StepArgs>,
) -> Result<(), DeviceError> {
    let LearnBuffers { lo, delta, target, v, m1, m2, soft, product } = buffers;
    for args in steps {
        // A gradient only steers: what is found is measured otherwise.
        device.matmul_rough(
            Product::new(rows, cols, cols),
            MatRef::new(soft, cols),
            MatRef::new(h, cols),
            MatMut::new(product, cols),
        )?;
        let buffers = StepBuffers {
            len: rows.saturating_mul(cols),
            gradient: StepGradient::Difference { product, target },
            lo,
            delta,
            v,
            m1,
            m2,
            soft,
        };
        device.adaround_step(&args, buffers)?;
    }
    Ok(())
}

/// `residual += flips * h[block, :]`, all columns.
pub(crate) fn carry_flips<D: Device + ?Sized>(
    device: &D,
    shape: &RefineShape,
    h: &D::Buffer,
    flips: &D::Buffer,
    residual: &mut D::Buffer,
) -> Result<(), DeviceError> {
    let RefineShape { rows, cols, ref block } = *shape;
    device.matmul(
        Product { beta: 1.0, ..Product::new(rows, cols, block.len()) },
        MatRef::new(flips, block.len()),
        MatRef::new(h, cols).at(block.start.saturating_mul(cols)),
        MatMut::new(residual, cols),
    )
}
