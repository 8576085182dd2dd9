//! The device interface, and the CPU behind it.
//!
//! A row chunk's state (weights, rounding variables, moments, residuals) stays in [`Device::Buffer`]s for the whole
//! solve; the host sees it on `download`. Every method checks shapes and returns a [`DeviceError`]; none allocates
//! except `zeros`, `upload` and what is done with second moments (bounded, whatever their size).
//!
//! Not here: the kernels (`cpu`), anything about AdaRound's schedule (`solver`).

use std::ops::{Deref, DerefMut, Range};

use crate::activation::{self, Activation};
use crate::cpu;
use crate::cpu::step::{Gradient, StepArgs};
use crate::shape::{self, area, span};

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
    /// digits (TF32: 10 bits) where that is faster. Never for what is compared or reported.
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

    /// `a -= b`, the first `len` elements.
    fn subtract(&self, len: usize, a: &mut Self::Buffer, b: &Self::Buffer) -> Result<(), DeviceError>;

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

/// The CPU as a device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl Cpu {
    /// The instruction-set level results depend on: "x86-64 avx512", "x86-64 avx2" or "baseline".
    pub fn isa(&self) -> &'static str {
        cpu::isa().name()
    }
}

/// Host memory as a device buffer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CpuBuffer(pub Vec<f32>);

impl Deref for CpuBuffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for CpuBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

fn first<'a>(operand: &'static str, slice: &'a [f32], len: usize) -> Result<&'a [f32], DeviceError> {
    shape::length(operand, slice.len(), len)?;
    Ok(&slice[..len])
}

fn first_mut<'a>(
    operand: &'static str,
    slice: &'a mut [f32],
    len: usize,
) -> Result<&'a mut [f32], DeviceError> {
    shape::length(operand, slice.len(), len)?;
    Ok(&mut slice[..len])
}

fn operand<'a>(
    name: &'static str,
    mat: &MatRef<'a, CpuBuffer>,
    rows: usize,
    cols: usize,
) -> Result<&'a [f32], DeviceError> {
    let (rows, cols) = if mat.transposed { (cols, rows) } else { (rows, cols) };
    let buffer: &'a CpuBuffer = mat.buffer;
    Ok(&buffer[span(name, buffer.len(), mat.offset, mat.stride, rows, cols)?])
}

impl Moments<'_, CpuBuffer> {
    /// A copy with the diagonal meant. On the host, whoever has the matrix itself needs none: this is for tests of devices.
    fn whole(self, cols: usize) -> Result<Vec<f32>, DeviceError> {
        let mut matrix = CpuBuffer(first("moments plus", self.matrix, area(cols, cols))?.to_vec());
        if let Some(diagonal) = self.diagonal {
            Cpu.set_diagonal(cols, diagonal, &mut matrix)?;
        }
        Ok(matrix.0)
    }
}

impl Device for Cpu {
    type Buffer = CpuBuffer;
    const IS_HOST: bool = true;

    fn describe(&self) -> String {
        format!("cpu {}", self.isa())
    }

    fn zeros(&self, len: usize) -> Result<CpuBuffer, DeviceError> {
        let mut values = Vec::new();
        values.try_reserve_exact(len).map_err(|_| DeviceError::OutOfMemory {
            device: self.describe(),
            asked: len.saturating_mul(size_of::<f32>()),
            free: None,
        })?;
        values.resize(len, 0.0);
        Ok(CpuBuffer(values))
    }

    fn upload(&self, host: &[f32]) -> Result<CpuBuffer, DeviceError> {
        Ok(CpuBuffer(host.to_vec()))
    }

    fn adopt(&self, host: Vec<f32>) -> Result<CpuBuffer, DeviceError> {
        Ok(CpuBuffer(host))
    }

    fn write(&self, host: &[f32], buffer: &mut CpuBuffer) -> Result<(), DeviceError> {
        first_mut("write", buffer, host.len())?.copy_from_slice(host);
        Ok(())
    }

    fn download(&self, buffer: &CpuBuffer, host: &mut [f32]) -> Result<(), DeviceError> {
        host.copy_from_slice(first("download", buffer, host.len())?);
        Ok(())
    }

    fn matmul(
        &self,
        product: Product,
        a: MatRef<'_, CpuBuffer>,
        b: MatRef<'_, CpuBuffer>,
        out: MatMut<'_, CpuBuffer>,
    ) -> Result<(), DeviceError> {
        let Product { m, n, k, .. } = product;
        let lhs = cpu::product::Stored {
            data: operand("matmul a", &a, m, k)?,
            stride: a.stride,
            transposed: a.transposed,
        };
        let rhs = cpu::product::Stored {
            data: operand("matmul b", &b, k, n)?,
            stride: b.stride,
            transposed: b.transposed,
        };
        let range = span("matmul out", out.buffer.len(), out.offset, out.stride, m, n)?;
        cpu::product::multiply(product, lhs, rhs, &mut out.buffer[range], out.stride);
        Ok(())
    }

    fn gram(&self, x: &CpuBuffer, n: usize, k: usize, g: &mut CpuBuffer) -> Result<(), DeviceError> {
        let x = first("gram x", x, area(n, k))?;
        let g = first_mut("gram g", g, area(k, k))?;
        cpu::gram_lower(x, n, k, g);
        cpu::mirror_lower(g, k);
        Ok(())
    }

    fn adaround_step(&self, args: &StepArgs, buffers: StepBuffers<'_, CpuBuffer>) -> Result<(), DeviceError> {
        let len = buffers.len;
        let gradient = match buffers.gradient {
            StepGradient::Difference { product, target } => Gradient::Difference {
                product: first("step product", product, len)?,
                target: first("step target", target, len)?,
            },
            StepGradient::Given { gradient } => Gradient::Given(first("step gradient", gradient, len)?),
        };
        cpu::adaround_step(
            args,
            gradient,
            first("step lo", buffers.lo, len)?,
            first("step delta", buffers.delta, len)?,
            first_mut("step v", buffers.v, len)?,
            first_mut("step m1", buffers.m1, len)?,
            first_mut("step m2", buffers.m2, len)?,
            first_mut("step soft", buffers.soft, len)?,
        );
        Ok(())
    }

    fn refine_block(
        &self,
        refine: &RefineShape,
        h: &CpuBuffer,
        residual: &CpuBuffer,
        delta: &CpuBuffer,
        up: &mut CpuBuffer,
        flips: &mut CpuBuffer,
    ) -> Result<u64, DeviceError> {
        let RefineShape { rows, cols, ref block } = *refine;
        shape::refine_block(refine)?;
        let len = area(rows, cols);
        Ok(cpu::refine_block(
            rows,
            cols,
            block.clone(),
            first("refine h", h, area(cols, cols))?,
            first("refine residual", residual, len)?,
            first("refine delta", delta, len)?,
            first_mut("refine up", up, len)?,
            first_mut("refine flips", flips, area(rows, block.len()))?,
        ))
    }

    fn subtract(&self, len: usize, a: &mut CpuBuffer, b: &CpuBuffer) -> Result<(), DeviceError> {
        let (a, b) = (first_mut("subtract a", a, len)?, first("subtract b", b, len)?);
        a.iter_mut().zip(b).for_each(|(a, b)| *a -= b);
        Ok(())
    }

    fn gather_rows(
        &self,
        source: &CpuBuffer,
        k: usize,
        indices: &[u32],
        out: &mut CpuBuffer,
    ) -> Result<(), DeviceError> {
        let out = first_mut("gather out", out, area(indices.len(), k))?;
        if k == 0 {
            return Ok(());
        }
        let limit = source.len() / k;
        for (&index, row) in indices.iter().zip(out.chunks_exact_mut(k)) {
            let index = shape::row("gather source", index, limit)?;
            row.copy_from_slice(&source[index * k..(index + 1) * k]);
        }
        Ok(())
    }

    fn gather_columns(
        &self,
        source: &CpuBuffer,
        rows: usize,
        order: &[u32],
        out: &mut CpuBuffer,
    ) -> Result<(), DeviceError> {
        let width = order.len();
        let source = first("gather source", source, area(rows, width))?;
        let out = first_mut("gather out", out, area(rows, width))?;
        for &column in order {
            shape::row("gather order", column, width)?;
        }
        if width > 0 {
            for (line, from) in out.chunks_exact_mut(width).zip(source.chunks_exact(width)) {
                line.iter_mut().zip(order).for_each(|(value, column)| *value = from[*column as usize]);
            }
        }
        Ok(())
    }

    fn factor_block(
        &self,
        n: usize,
        block: Range<usize>,
        extra: f32,
        a: &CpuBuffer,
        lower: &mut CpuBuffer,
        inverses: &mut CpuBuffer,
    ) -> Result<(), DeviceError> {
        shape::plane_block(n, &block)?;
        let a = first("factor a", a, area(n, n))?;
        let lower = first_mut("factor lower", lower, area(n, n))?;
        let inverses = first_mut("factor inverses", inverses, area(n, cpu::PLANE_BLOCK))?;
        cpu::factor_block(n, block, extra, a, lower, inverses);
        Ok(())
    }

    fn plane_block(
        &self,
        rows: usize,
        n: usize,
        block: Range<usize>,
        factor: &CpuBuffer,
        buffers: PlaneBuffers<'_, CpuBuffer>,
        up: &mut CpuBuffer,
        errors: &mut CpuBuffer,
    ) -> Result<(), DeviceError> {
        shape::plane_block(n, &block)?;
        let len = area(rows, n);
        let factor = first("plane factor", factor, area(n, n))?;
        let PlaneBuffers { low, delta, offset } = buffers;
        let values = (
            first("plane low", low, len)?,
            first("plane delta", delta, len)?,
            first("plane offset", offset, len)?,
        );
        let (up, errors) = (first_mut("plane up", up, len)?, first_mut("plane errors", errors, len)?);
        cpu::plane_block(rows, n, block, factor, values, up, errors);
        Ok(())
    }

    fn multiply_moments(
        &self,
        rows: usize,
        cols: usize,
        w: &CpuBuffer,
        plus: Moments<'_, CpuBuffer>,
        minus: Option<&CpuBuffer>,
        out: &mut CpuBuffer,
    ) -> Result<(), DeviceError> {
        let (w, out) =
            (first("moments w", w, area(rows, cols))?, first_mut("moments out", out, area(rows, cols))?);
        let plus = plus.whole(cols)?;
        let minus = minus.map(|minus| first("moments minus", minus, area(cols, cols))).transpose()?;
        cpu::multiply_moments(rows, cols, w, &plus, minus, out);
        Ok(())
    }

    fn exact_differences(
        &self,
        rows: usize,
        cols: usize,
        (a, b): (&CpuBuffer, &CpuBuffer),
        h: Moments<'_, CpuBuffer>,
        gap: Option<(&CpuBuffer, &CpuBuffer)>,
    ) -> Result<Vec<f64>, DeviceError> {
        let len = area(rows, cols);
        let errors = (first("difference first", a, len)?, first("difference second", b, len)?);
        let h = h.whole(cols)?;
        let gap = match gap {
            Some((w, c)) => {
                Some((first("difference w", w, len)?, first("difference c", c, area(cols, cols))?))
            }
            None => None,
        };
        Ok(cpu::exact_differences(rows, cols, errors, &h, gap))
    }

    fn normal_equations(
        &self,
        rows: usize,
        cols: usize,
        width: usize,
        levels: &CpuBuffer,
        h: &CpuBuffer,
        scratch: &mut CpuBuffer,
    ) -> Result<Vec<f64>, DeviceError> {
        let levels = first("normal levels", levels, area(rows, cols))?;
        let h = first("normal h", h, area(cols, cols))?;
        let scratch = first_mut("normal scratch", scratch, area(rows, cols))?;
        Ok(cpu::normal_equations((rows, cols, width), levels, h, scratch))
    }

    fn column_gaps(
        &self,
        cols: usize,
        a: &CpuBuffer,
        b: &CpuBuffer,
    ) -> Result<(Vec<f32>, bool), DeviceError> {
        let len = area(cols, cols);
        Ok(cpu::column_gaps(cols, first("gap a", a, len)?, first("gap b", b, len)?))
    }

    fn set_diagonal(
        &self,
        n: usize,
        diagonal: &CpuBuffer,
        matrix: &mut CpuBuffer,
    ) -> Result<(), DeviceError> {
        let diagonal = first("diagonal", diagonal, n)?;
        let matrix = first_mut("diagonal matrix", matrix, area(n, n))?;
        matrix.iter_mut().step_by(n + 1).zip(diagonal).for_each(|(to, from)| *to = *from);
        Ok(())
    }

    fn all_finite(&self, len: usize, values: &CpuBuffer) -> Result<bool, DeviceError> {
        Ok(first("finite values", values, len)?.iter().all(|value| value.is_finite()))
    }

    fn activation_residual(
        &self,
        activations: &[Activation],
        bias: &[f32],
        rows: usize,
        cols: usize,
        z: &mut CpuBuffer,
        target: &CpuBuffer,
    ) -> Result<(), DeviceError> {
        shape::per_row(activations, bias, rows)?;
        let len = area(rows, cols);
        let z = first_mut("activation z", z, len)?;
        let target = first("activation target", target, len)?;
        if cols == 0 {
            return Ok(());
        }
        for (row, (z, target)) in z.chunks_exact_mut(cols).zip(target.chunks_exact(cols)).enumerate() {
            let activation = if activations.len() == 1 { activations[0] } else { activations[row] };
            activation::residual(activation, bias.get(row).copied().unwrap_or(0.0), z, target);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn upload(values: &[f32]) -> CpuBuffer {
        Cpu.upload(values).unwrap()
    }

    #[test]
    fn buffers_round_trip_and_refuse_more_than_they_hold() {
        let mut buffer = Cpu.zeros(3).unwrap();
        Cpu.write(&[1.0, 2.0], &mut buffer).unwrap();
        let mut host = [9.0; 3];
        Cpu.download(&buffer, &mut host).unwrap();
        assert_eq!(host, [1.0, 2.0, 0.0]);
        let error = Cpu.write(&[0.0; 4], &mut buffer).unwrap_err();
        assert_eq!(error.to_string(), "write: buffer too short, expected at least 4 elements, actual 3");
        assert!(Cpu.download(&buffer, &mut [0.0; 4]).is_err());
        assert!(matches!(Cpu.zeros(usize::MAX / 2), Err(DeviceError::OutOfMemory { .. })));
    }

    #[test]
    fn matmul_uses_offsets_strides_and_transposes() {
        let a = upload(&[0.0, 1.0, 2.0, 9.0, 3.0, 4.0, 9.0]);
        let b = upload(&[5.0, 7.0, 6.0, 8.0]);
        let mut out = Cpu.zeros(6).unwrap();
        let a = MatRef::new(&a, 3).at(1);
        Cpu.matmul(Product::new(2, 2, 2), a, MatRef::transposed(&b, 2), MatMut::new(&mut out, 3).at(1))
            .unwrap();
        assert_eq!(out.0, [0.0, 19.0, 22.0, 0.0, 43.0, 50.0]);
    }

    #[test]
    fn matmul_names_the_operand_that_does_not_fit() {
        let (short, fine) = (upload(&[0.0; 3]), upload(&[0.0; 4]));
        let call = |a: MatRef<'_, CpuBuffer>, b: MatRef<'_, CpuBuffer>, m: usize, stride: usize| {
            let mut out = CpuBuffer(vec![0.0; 4]);
            Cpu.matmul(Product::new(m, 2, 2), a, b, MatMut::new(&mut out, stride)).unwrap_err().to_string()
        };
        let two = |buffer| MatRef::new(buffer, 2);
        assert!(
            call(two(&short), two(&fine), 2, 2)
                .starts_with("matmul a: buffer too short, expected at least 4")
        );
        assert!(
            call(two(&fine), two(&fine).at(1), 2, 2)
                .starts_with("matmul b: buffer too short, expected at least 5")
        );
        assert!(call(two(&fine), two(&fine), 2, 1).starts_with("matmul out: row stride 1"));
        assert!(
            call(MatRef::new(&fine, usize::MAX), two(&fine), 2, 2).starts_with("matmul a: buffer too short")
        );
        assert!(call(two(&fine), two(&fine), usize::MAX, 2).starts_with("matmul a: buffer too short"));
    }

    #[test]
    fn gram_is_symmetric_and_accumulates() {
        let x = upload(&[1.0, 2.0, 3.0, 4.0]);
        let mut g = Cpu.zeros(4).unwrap();
        Cpu.gram(&x, 2, 2, &mut g).unwrap();
        Cpu.gram(&x, 1, 2, &mut g).unwrap();
        assert_eq!(g.0, [11.0, 16.0, 16.0, 24.0]);
        assert!(Cpu.gram(&x, 2, 3, &mut g).is_err());
        assert!(Cpu.gram(&x, usize::MAX, 2, &mut g).is_err());
    }

    #[test]
    fn gather_copies_rows_and_refuses_one_past_the_end() {
        let source = upload(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let mut out = Cpu.zeros(4).unwrap();
        Cpu.gather_rows(&source, 2, &[2, 0], &mut out).unwrap();
        assert_eq!(out.0, [5.0, 6.0, 1.0, 2.0]);
        let error = Cpu.gather_rows(&source, 2, &[3], &mut out).unwrap_err();
        assert_eq!(error.to_string(), "gather source: index 3 out of range, expected less than 3");
    }

    #[test]
    fn step_and_refinement_are_the_plain_functions() {
        let args = StepArgs::adam(0.1);
        let (lo, delta, product, target) =
            (upload(&[0.0; 2]), upload(&[1.0; 2]), upload(&[1.0, -1.0]), upload(&[0.0; 2]));
        let [mut v, mut m1, mut m2, mut soft] = [(); 4].map(|()| CpuBuffer(vec![0.0; 2]));
        let gradient = StepGradient::Difference { product: &product, target: &target };
        let buffers = StepBuffers {
            len: 2,
            gradient,
            lo: &lo,
            delta: &delta,
            v: &mut v,
            m1: &mut m1,
            m2: &mut m2,
            soft: &mut soft,
        };
        Cpu.adaround_step(&args, buffers).unwrap();
        assert!(v[0] < 0.0 && v[1] > 0.0 && soft[0] < 0.5 && soft[1] > 0.5, "downhill: {v:?} {soft:?}");
        let (h, residual) = (upload(&[1.0, 0.0, 0.0, 1.0]), upload(&[-2.0, 2.0]));
        let (mut up, mut flips) = (upload(&[0.0; 2]), upload(&[0.0; 2]));
        let shape = RefineShape { rows: 1, cols: 2, block: 0..2 };
        assert_eq!(Cpu.refine_block(&shape, &h, &residual, &delta, &mut up, &mut flips).unwrap(), 1);
        assert_eq!((up.0.clone(), flips.0.clone()), (vec![1.0, 0.0], vec![1.0, 0.0]));
        let outside = RefineShape { block: 1..3, ..shape };
        assert!(Cpu.refine_block(&outside, &h, &residual, &delta, &mut up, &mut flips).is_err());
    }

    #[test]
    fn differences_are_taken_of_the_first_elements_only() {
        let (mut a, b) = (upload(&[5.0, 7.0, 9.0]), upload(&[1.0, 2.0]));
        Cpu.subtract(2, &mut a, &b).unwrap();
        assert_eq!(a.0, [4.0, 5.0, 9.0]);
        assert!(Cpu.subtract(3, &mut a, &b).is_err());
    }

    #[test]
    fn activation_residual_takes_one_entry_or_one_per_row() {
        let target = upload(&[1.0, 1.0]);
        let mut z = upload(&[-3.0, 3.0]);
        let activations = [Activation::PRelu { slope: 0.5 }, Activation::Relu];
        Cpu.activation_residual(&activations, &[1.0, 0.0], 2, 1, &mut z, &target).unwrap();
        assert_eq!(z.0, [(-1.0 - 1.0) * 0.5, 2.0]);
        Cpu.activation_residual(&[Activation::Identity], &[], 2, 1, &mut z, &target).unwrap();
        assert_eq!(z.0, [-2.0, 1.0]);
        assert!(Cpu.activation_residual(&activations, &[0.0], 2, 1, &mut z, &target).is_err());
        assert!(Cpu.activation_residual(&activations, &[], 3, 1, &mut z, &target).is_err());
    }

    /// Small numbers most of the time, sometimes enormous ones.
    fn size() -> impl Strategy<Value = usize> {
        prop_oneof![9 => 0..6usize, 1 => Just(usize::MAX), 1 => Just(1usize << 40)]
    }

    proptest! {
        #[test]
        fn no_shape_makes_the_cpu_panic(
            (m, n, k) in (size(), size(), size()),
            (strides, offsets) in ((size(), size(), size()), (size(), size(), size())),
            transposed in any::<[bool; 2]>(),
            lens in (0..40usize, 0..40usize, 0..40usize),
        ) {
            let (a, b) = (CpuBuffer(vec![1.0; lens.0]), CpuBuffer(vec![1.0; lens.1]));
            let mut out = CpuBuffer(vec![0.0; lens.2]);
            let lhs = MatRef { buffer: &a, offset: offsets.0, stride: strides.0, transposed: transposed[0] };
            let rhs = MatRef { buffer: &b, offset: offsets.1, stride: strides.1, transposed: transposed[1] };
            let _ = Cpu.matmul(Product::new(m, n, k), lhs, rhs, MatMut { buffer: &mut out, offset: offsets.2, stride: strides.2 });
            let _ = Cpu.gram(&a, n, k, &mut out);
            let _ = Cpu.gather_rows(&a, k, &[0, 3], &mut out);
            let shape = RefineShape { rows: m, cols: k, block: n..strides.0 };
            let (mut up, mut flips) = (a.clone(), b.clone());
            let _ = Cpu.refine_block(&shape, &b, &a, &a, &mut up, &mut flips);
            let _ = Cpu.activation_residual(&[Activation::Relu], &[], m, k, &mut out, &a);
            let _ = Cpu.gather_columns(&a, m, &[1, 0, 7][..k.min(3)], &mut out);
            let _ = Cpu.factor_block(k, n..strides.0, 0.0, &a, &mut out, &mut up);
            let moments = Moments { matrix: &a, diagonal: Some(&b) };
            let _ = Cpu.multiply_moments(m, k, &a, moments, Some(&b), &mut out);
            let _ = Cpu.exact_differences(m, k, (&a, &b), moments, Some((&a, &b)));
            let _ = Cpu.normal_equations(m, k, n, &a, &b, &mut out);
            let _ = Cpu.column_gaps(k, &a, &b);
            let _ = Cpu.set_diagonal(k, &a, &mut out);
            let _ = Cpu.all_finite(k, &a);
            let buffers = PlaneBuffers { low: &a, delta: &b, offset: &a };
            let _ = Cpu.plane_block(m, k, n..strides.0, &a, buffers, &mut out, &mut flips);
        }
    }
}
