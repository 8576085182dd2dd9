//! [`Cuda`] behind the device interface: what a solve needs, argument by argument.
//!
//! Calls queue work and return; only what gives the host numbers waits for it. Every argument is checked as the CPU checks it
//! before an address leaves this file.
//!
//! Not here: lanes, arrays and launches (`device`), argument order and grids (`kernels`), second moments (`moments`).
#![expect(unsafe_code, reason = "products on raw device addresses, checked here")]

use std::ops::Range;

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits};

use super::blas::{Digits, WORKSPACE_BYTES};
use super::column_major::{ColumnMajor, int, leading};
use super::device::{Cuda, CudaBuffer, Precision, Scratch, count, offset};
use super::kernels::{self, DescentState, PlaneState, RefineState, StepState};
use crate::activation::Activation;
use crate::cpu;
use crate::cpu::step::StepArgs;
use crate::device::{
    Descent, Device, DeviceError, LearnBuffers, MatMut, MatRef, Moments, PlaneBuffers, Product, RefineShape,
    RowTerms, Steering, StepBuffers, StepGradient, carry_flips, learn,
};
use crate::shape::{self, area, span};

/// A block of `n` columns as kernels take it: `n`, its start and width.
fn columns(n: usize, block: &Range<usize>) -> Result<(u32, u32, u32), DeviceError> {
    Ok((count("plane columns", n)?, count("plane block", block.start)?, count("plane block", block.len())?))
}

/// An activation as the kernels know it: its number and two parameters.
pub(super) fn row_of_table(activation: Activation, bias: f32) -> [f32; 4] {
    let (kind, a, b) = match activation {
        Activation::Identity => (0, 0.0, 0.0),
        Activation::Relu => (1, 0.0, 0.0),
        Activation::Clip { min, max } => (2, min, max),
        Activation::LeakyRelu { slope } | Activation::PRelu { slope } => (3, slope, 0.0),
        Activation::Sigmoid => (4, 0.0, 0.0),
        Activation::Tanh => (5, 0.0, 0.0),
        Activation::HardSwish => (6, 0.0, 0.0),
        Activation::Silu => (7, 0.0, 0.0),
        Activation::Gelu => (8, 0.0, 0.0),
        Activation::GeluTanh => (9, 0.0, 0.0),
    };
    [kind as f32, a, b, bias]
}

/// The table of [`kernels::activation_residual`] and its entries: one if all rows are alike.
fn table_of(activations: &[Activation], bias: &[f32], rows: usize) -> impl Iterator<Item = [f32; 4]> {
    let entries = if activations.len() == 1 && bias.is_empty() { 1 } else { rows };
    (0..entries).map(move |row| {
        let activation = activations[row.min(activations.len() - 1)];
        row_of_table(activation, bias.get(row).copied().unwrap_or(0.0))
    })
}

impl Device for Cuda {
    type Buffer = CudaBuffer;
    const IS_HOST: bool = false;

    fn describe(&self) -> String {
        self.opened.kind.clone()
    }

    fn zeros(&self, len: usize) -> Result<CudaBuffer, DeviceError> {
        let mut buffer = self.allocate(len)?;
        self.stream.memset_zeros(&mut buffer.slice).map_err(|error| self.driver(error))?;
        Ok(buffer)
    }

    fn upload(&self, host: &[f32]) -> Result<CudaBuffer, DeviceError> {
        let mut buffer = self.allocate(host.len())?;
        self.write(host, &mut buffer)?;
        Ok(buffer)
    }

    fn share(&self, buffer: &mut CudaBuffer) -> Result<(), DeviceError> {
        self.publish(buffer)
    }

    fn write(&self, host: &[f32], buffer: &mut CudaBuffer) -> Result<(), DeviceError> {
        self.written("write", buffer, host.len())?;
        if host.is_empty() {
            return Ok(());
        }
        self.send(host, buffer)
    }

    fn clear(&self, len: usize, buffer: &mut CudaBuffer) -> Result<(), DeviceError> {
        self.written("clear", buffer, len)?;
        match len {
            0 => Ok(()),
            len => {
                let cleared = self.stream.memset_zeros(&mut buffer.slice.slice_mut(..len));
                cleared.map_err(|error| self.driver(error))
            }
        }
    }

    fn download(&self, buffer: &CudaBuffer, host: &mut [f32]) -> Result<(), DeviceError> {
        let (len, mut done) = (host.len(), 0);
        self.bring_parts("download", buffer, 0..len, &mut |part| {
            host[done..done + part.len()].copy_from_slice(part);
            done += part.len();
        })
    }

    fn matmul(
        &self,
        product: Product,
        a: MatRef<'_, CudaBuffer>,
        b: MatRef<'_, CudaBuffer>,
        out: MatMut<'_, CudaBuffer>,
    ) -> Result<(), DeviceError> {
        self.multiply(product, Digits::Full, a, b, out)
    }

    fn matmul_rough(
        &self,
        product: Product,
        a: MatRef<'_, CudaBuffer>,
        b: MatRef<'_, CudaBuffer>,
        out: MatMut<'_, CudaBuffer>,
    ) -> Result<(), DeviceError> {
        let digits = match self.opened.precision {
            Precision::Tf32 => Digits::Rough,
            Precision::F32 => Digits::Full,
        };
        self.multiply(product, digits, a, b, out)
    }

    fn gram(&self, x: &CudaBuffer, n: usize, k: usize, g: &mut CudaBuffer) -> Result<(), DeviceError> {
        let x = self.read("gram x", x, area(n, k))?;
        let g = self.written("gram g", g, area(k, k))?;
        if k == 0 {
            return Ok(());
        }
        let (samples, side) = (int("gram samples", n)?, int("gram columns", k)?);
        if n > 0 {
            self.opened.context.bind_to_thread().map_err(|error| self.driver(error))?;
            // SAFETY: both lengths were checked above; `g` is borrowed mutably, so it is not `x`.
            unsafe { self.blas.gram_lower(samples, side, x, g) }
                .map_err(|error| self.opened.subject(WORKSPACE_BYTES).blas(error))?;
        }
        self.launch(kernels::mirror_lower(side.unsigned_abs(), g))
    }

    fn adaround_step(
        &self,
        args: &StepArgs,
        buffers: StepBuffers<'_, CudaBuffer>,
    ) -> Result<(), DeviceError> {
        let len = buffers.len;
        let gradient = match buffers.gradient {
            StepGradient::Difference { product, target } => {
                (self.read("step product", product, len)?, Some(self.read("step target", target, len)?))
            }
            StepGradient::Given { gradient } => (self.read("step gradient", gradient, len)?, None),
        };
        let state = StepState {
            lo: self.read("step lo", buffers.lo, len)?,
            delta: self.read("step delta", buffers.delta, len)?,
            v: self.written("step v", buffers.v, len)?,
            m1: self.written("step m1", buffers.m1, len)?,
            m2: self.written("step m2", buffers.m2, len)?,
            soft: self.written("step soft", buffers.soft, len)?,
        };
        let size = self.opened.size;
        match gradient {
            _ if len == 0 => Ok(()),
            (product, Some(target)) => {
                self.launch(kernels::step_difference(size, len, product, target, state, args))
            }
            (gradient, None) => self.launch(kernels::step_given(size, len, gradient, state, args)),
        }
    }

    fn steering(
        &self,
        cols: usize,
        h: &CudaBuffer,
        diagonal: &[f32],
    ) -> Result<Option<Steering<CudaBuffer>>, DeviceError> {
        self.halves_of_h(cols, h, diagonal)
    }

    fn learn(
        &self,
        shape: (usize, usize),
        h: &CudaBuffer,
        steering: Option<&Steering<CudaBuffer>>,
        buffers: LearnBuffers<'_, CudaBuffer>,
        steps: &mut dyn Iterator<Item = StepArgs>,
    ) -> Result<(), DeviceError> {
        match steering {
            Some(steering) => self.learn_in_halves(shape, steering, buffers, steps),
            None => learn(self, shape, h, buffers, steps),
        }
    }

    fn refine_block(
        &self,
        refine: &RefineShape,
        h: &CudaBuffer,
        residual: &CudaBuffer,
        delta: &CudaBuffer,
        up: &mut CudaBuffer,
        flips: &mut CudaBuffer,
    ) -> Result<u64, DeviceError> {
        shape::refine_block(refine)?;
        let counted = count("refine rows", refine.rows)?;
        let mut scratch = self.scratch();
        let Scratch { counts, total, .. } = &mut *scratch;
        self.grow(counts, refine.rows)?;
        let mine = counts.device_ptr_mut(&self.stream).0;
        self.queue_refinement(refine, h, residual, delta, up, flips, mine)?;
        match refine.rows == 0 || refine.block.is_empty() {
            true => Ok(0),
            false => self.total(counted, counts, total),
        }
    }

    /// Without a wait between blocks: flips are counted at the end, and products of blocks without any change nothing.
    fn refine_sweep(
        &self,
        rows: usize,
        cols: usize,
        h: &CudaBuffer,
        residual: &mut CudaBuffer,
        delta: &CudaBuffer,
        up: &mut CudaBuffer,
        flips: &mut CudaBuffer,
    ) -> Result<u64, DeviceError> {
        let blocks = cols.div_ceil(cpu::REFINE_BLOCK);
        let counted = count("refine rows of all blocks", area(rows, blocks))?;
        if counted == 0 {
            return Ok(0);
        }
        let mut scratch = self.scratch();
        let Scratch { counts, total, .. } = &mut *scratch;
        self.grow(counts, area(rows, blocks))?;
        for number in 0..blocks {
            let start = number * cpu::REFINE_BLOCK;
            let shape = RefineShape { rows, cols, block: start..cols.min(start + cpu::REFINE_BLOCK) };
            let mine = offset(counts.device_ptr_mut(&self.stream).0, number * rows);
            self.queue_refinement(&shape, h, residual, delta, up, flips, mine)?;
            carry_flips(self, &shape, h, flips, residual)?;
        }
        self.total(counted, counts, total)
    }

    /// All sweeps at once, where a row's residuals fit registers.
    fn descend(
        &self,
        sweeps: u32,
        rows: usize,
        cols: usize,
        h: &CudaBuffer,
        residual: &mut CudaBuffer,
        delta: &CudaBuffer,
        up: &mut CudaBuffer,
        flips: &mut CudaBuffer,
    ) -> Result<Descent, DeviceError> {
        let (counted, len) = (count("refine rows", rows)?, area(rows, cols));
        let mut scratch = self.scratch();
        let Scratch { counts, total, most, .. } = &mut *scratch;
        self.grow(counts, area(rows, 2))?;
        let flipped = counts.device_ptr_mut(&self.stream).0;
        let state = DescentState {
            h: self.read("refine h", h, area(cols, cols))?,
            residual: self.written("refine residual", residual, len)?,
            delta: self.read("refine delta", delta, len)?,
            up: self.written("refine up", up, len)?,
            counts: flipped,
            ran: offset(flipped, rows),
        };
        if sweeps == 0 || len == 0 {
            return Ok(Descent { settled: len == 0, ..Descent::default() });
        }
        let width = count("refine columns", cols)?;
        match kernels::refine_rows(self.opened.size, counted, width, sweeps, state) {
            Some(launch) => self.launch(launch)?,
            None => {
                drop(scratch);
                let flips = self.refine_sweep(rows, cols, h, residual, delta, up, flips)?;
                return Ok(Descent { sweeps: 1, flips, settled: flips == 0 });
            }
        }
        self.launch(kernels::magnitude::max_u32(counted, state.ran, most.device_ptr_mut(&self.stream).0))?;
        let flips = self.total(counted, counts, total)?;
        let mut ran = [0u32];
        self.stream.memcpy_dtoh(most, &mut ran).map_err(|error| self.driver(error))?;
        self.synchronize()?;
        // A row that had sweeps left stopped because it was settled.
        Ok(Descent { sweeps: ran[0], flips, settled: ran[0] < sweeps || flips == 0 })
    }

    fn subtract(&self, len: usize, a: &mut CudaBuffer, b: &CudaBuffer) -> Result<(), DeviceError> {
        let (a, b) = (self.written("subtract a", a, len)?, self.read("subtract b", b, len)?);
        if len == 0 {
            return Ok(());
        }
        let len = int("subtract length", len)?;
        self.opened.context.bind_to_thread().map_err(|error| self.driver(error))?;
        // SAFETY: both lengths were checked above; `a` is borrowed mutably, so it is not `b`.
        unsafe { self.blas.subtract(len, a, b) }
            .map_err(|error| self.opened.subject(WORKSPACE_BYTES).blas(error))
    }

    fn rounding_errors(
        &self,
        len: usize,
        low: &CudaBuffer,
        delta: &CudaBuffer,
        up: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        self.errors_of(len, low, delta, up, out)
    }

    fn row_sums(
        &self,
        rows: usize,
        cols: usize,
        terms: RowTerms<'_, CudaBuffer>,
    ) -> Result<Vec<[f64; 4]>, DeviceError> {
        self.sums_of_rows(rows, cols, terms)
    }

    fn run_dots(
        &self,
        rows: usize,
        cols: usize,
        width: usize,
        a: &CudaBuffer,
        b: &CudaBuffer,
    ) -> Result<Vec<f64>, DeviceError> {
        self.dots_of_runs((rows, cols), width, a, b)
    }

    fn scale_rows(
        &self,
        cols: usize,
        by: &[f32],
        source: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        self.scaled_rows(cols, by, source, out)
    }

    fn copy_rows(
        &self,
        cols: usize,
        indices: &[u32],
        source: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        self.copied_rows(cols, indices, source, out)
    }

    fn gather_rows(
        &self,
        source: &CudaBuffer,
        k: usize,
        indices: &[u32],
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let out = self.written("gather out", out, area(indices.len(), k))?;
        if k == 0 || indices.is_empty() {
            return Ok(());
        }
        let limit = source.len / k;
        for &index in indices {
            shape::row("gather source", index, limit)?;
        }
        let source = self.read("gather source", source, 0)?;
        let (rows, width) = (count("gather indices", indices.len())?, count("gather columns", k)?);
        let mut scratch = self.scratch();
        let indices = self.place_indices(&mut scratch, indices)?;
        self.launch(kernels::gather_rows(self.opened.size, rows, width, source, indices, out))
    }

    fn gather_columns(
        &self,
        source: &CudaBuffer,
        rows: usize,
        order: &[u32],
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let width = order.len();
        let source = self.read("gather source", source, area(rows, width))?;
        let out = self.written("gather out", out, area(rows, width))?;
        for &column in order {
            shape::row("gather order", column, width)?;
        }
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let (rows, width) = (count("gather rows", rows)?, count("gather columns", width)?);
        let mut scratch = self.scratch();
        let order = self.place_indices(&mut scratch, order)?;
        self.launch(kernels::gather_columns(self.opened.size, rows, width, source, order, out))
    }

    fn factor_block(
        &self,
        n: usize,
        block: Range<usize>,
        extra: f32,
        a: &CudaBuffer,
        lower: &mut CudaBuffer,
        inverses: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        shape::plane_block(n, &block)?;
        let a = self.read("factor a", a, area(n, n))?;
        let lower = self.written("factor lower", lower, area(n, n))?;
        let inverses = self.written("factor inverses", inverses, area(n, cpu::PLANE_BLOCK))?;
        if block.is_empty() {
            return Ok(());
        }
        self.launch(kernels::factor_block(columns(n, &block)?, extra, a, lower, inverses))
    }

    fn plane_block(
        &self,
        rows: usize,
        n: usize,
        block: Range<usize>,
        factor: &CudaBuffer,
        buffers: PlaneBuffers<'_, CudaBuffer>,
        up: &mut CudaBuffer,
        errors: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        shape::plane_block(n, &block)?;
        let len = area(rows, n);
        let state = PlaneState {
            factor: self.read("plane factor", factor, area(n, n))?,
            low: self.read("plane low", buffers.low, len)?,
            delta: self.read("plane delta", buffers.delta, len)?,
            offset: self.read("plane offset", buffers.offset, len)?,
            up: self.written("plane up", up, len)?,
            errors: self.written("plane errors", errors, len)?,
        };
        if rows == 0 || block.is_empty() {
            return Ok(());
        }
        let rows = count("plane rows", rows)?;
        self.launch(kernels::plane_block(self.opened.size, rows, columns(n, &block)?, state))
    }

    fn multiply_moments(
        &self,
        rows: usize,
        cols: usize,
        w: &CudaBuffer,
        plus: Moments<'_, CudaBuffer>,
        minus: Option<&CudaBuffer>,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        self.moment_products(rows, cols, w, plus, minus, out)
    }

    fn exact_differences(
        &self,
        rows: usize,
        cols: usize,
        errors: (&CudaBuffer, &CudaBuffer),
        h: Moments<'_, CudaBuffer>,
        gap: Option<(&CudaBuffer, &CudaBuffer)>,
    ) -> Result<Vec<f64>, DeviceError> {
        self.differences(rows, cols, errors, h, gap)
    }

    fn normal_equations(
        &self,
        rows: usize,
        cols: usize,
        width: usize,
        levels: &CudaBuffer,
        h: &CudaBuffer,
        scratch: &mut CudaBuffer,
    ) -> Result<Vec<f64>, DeviceError> {
        self.normals((rows, cols, width), levels, h, scratch)
    }

    fn column_gaps(
        &self,
        cols: usize,
        a: &CudaBuffer,
        b: &CudaBuffer,
    ) -> Result<(Vec<f32>, bool), DeviceError> {
        self.gaps(cols, a, b)
    }

    fn set_diagonal(
        &self,
        n: usize,
        diagonal: &CudaBuffer,
        matrix: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        self.replace_diagonal(n, diagonal, matrix)
    }

    fn all_finite(&self, len: usize, values: &CudaBuffer) -> Result<bool, DeviceError> {
        self.finite(len, values)
    }

    fn activation_residual(
        &self,
        activations: &[Activation],
        bias: &[f32],
        rows: usize,
        cols: usize,
        z: &mut CudaBuffer,
        target: &CudaBuffer,
    ) -> Result<(), DeviceError> {
        shape::per_row(activations, bias, rows)?;
        let len = area(rows, cols);
        let z = self.written("activation z", z, len)?;
        let target = self.read("activation target", target, len)?;
        if len == 0 {
            return Ok(());
        }
        let (row_count, cols) = (count("activation rows", rows)?, count("activation columns", cols)?);
        let mut scratch = self.scratch();
        let entries = self.tabulate(&mut scratch, activations, bias, rows)?;
        let table = scratch.table.device_ptr(&self.stream).0;
        let size = self.opened.size;
        self.launch(kernels::activation_residual(size, row_count, cols, entries, table, z, target))
    }
}

impl Cuda {
    /// The address of a stored factor of `rows` by `cols`.
    fn factor(
        &self,
        operand: &'static str,
        mat: &MatRef<'_, CudaBuffer>,
        rows: usize,
        cols: usize,
    ) -> Result<u64, DeviceError> {
        let (rows, cols) = if mat.transposed { (cols, rows) } else { (rows, cols) };
        let span = span(operand, mat.buffer.len, mat.offset, mat.stride, rows, cols)?;
        Ok(offset(self.read(operand, mat.buffer, 0)?, span.start))
    }

    fn multiply(
        &self,
        product: Product,
        digits: Digits,
        a: MatRef<'_, CudaBuffer>,
        b: MatRef<'_, CudaBuffer>,
        out: MatMut<'_, CudaBuffer>,
    ) -> Result<(), DeviceError> {
        let Product { m, n, k, alpha, beta } = product;
        let (left, right) = (self.factor("matmul a", &a, m, k)?, self.factor("matmul b", &b, k, n)?);
        let range = span("matmul out", out.buffer.len, out.offset, out.stride, m, n)?;
        let result = offset(self.written("matmul out", out.buffer, 0)?, range.start);
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.opened.context.bind_to_thread().map_err(|error| self.driver(error))?;
        let multiplied = if k == 0 {
            let shape = (int("matmul rows", m)?, int("matmul columns", n)?, leading(out.stride, n)?);
            // SAFETY: the span was checked above; `out` is borrowed mutably.
            unsafe { self.blas.scale(shape, beta, result) }
        } else {
            let args =
                ColumnMajor::new(product, (a.stride, a.transposed), (b.stride, b.transposed), out.stride)?;
            // SAFETY: the spans were checked above; `out` is borrowed mutably, so it is neither factor.
            unsafe { self.blas.product(&args, digits, (alpha, beta), right, left, result) }
        };
        multiplied.map_err(|error| self.opened.subject(WORKSPACE_BYTES).blas(error))
    }

    /// Makes `slot` at least `len` long; what it held is lost.
    fn grow<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        slot: &mut CudaSlice<T>,
        len: usize,
    ) -> Result<(), DeviceError> {
        if slot.len() >= len {
            return Ok(());
        }
        let larger = self.stream.alloc_zeros::<T>(len.next_power_of_two());
        *slot = larger.map_err(|error| {
            let asked = len.next_power_of_two().saturating_mul(size_of::<T>());
            self.opened.subject(asked).driver(error)
        })?;
        Ok(())
    }

    /// Decides a block of columns; flips of each row are counted at `counts`.
    fn queue_refinement(
        &self,
        refine: &RefineShape,
        h: &CudaBuffer,
        residual: &CudaBuffer,
        delta: &CudaBuffer,
        up: &mut CudaBuffer,
        flips: &mut CudaBuffer,
        counts: u64,
    ) -> Result<(), DeviceError> {
        let RefineShape { rows, cols, ref block } = *refine;
        let len = area(rows, cols);
        let state = RefineState {
            h: self.read("refine h", h, area(cols, cols))?,
            residual: self.read("refine residual", residual, len)?,
            delta: self.read("refine delta", delta, len)?,
            up: self.written("refine up", up, len)?,
            flips: self.written("refine flips", flips, area(rows, block.len()))?,
            counts,
        };
        if rows == 0 || block.is_empty() {
            return Ok(());
        }
        let (rows, cols) = (count("refine rows", rows)?, count("refine columns", cols)?);
        let (start, width) = (count("refine block", block.start)?, count("refine block", block.len())?);
        self.launch(kernels::refine_block(self.opened.size, rows, cols, start, width, state))
    }

    /// Puts indices on the device; where they are until the next call.
    pub(super) fn place_indices(&self, scratch: &mut Scratch, indices: &[u32]) -> Result<u64, DeviceError> {
        self.grow(&mut scratch.indices, indices.len())?;
        self.stream.memcpy_htod(indices, &mut scratch.indices).map_err(|error| self.driver(error))?;
        Ok(scratch.indices.device_ptr(&self.stream).0)
    }

    /// The sum of counts, waited for.
    fn total(
        &self,
        counted: u32,
        counts: &CudaSlice<u32>,
        total: &mut CudaSlice<u64>,
    ) -> Result<u64, DeviceError> {
        let counts = counts.device_ptr(&self.stream).0;
        self.launch(kernels::sum_counts(counted, counts, total.device_ptr_mut(&self.stream).0))?;
        let mut sum = [0u64];
        self.stream.memcpy_dtoh(total, &mut sum).map_err(|error| self.driver(error))?;
        self.synchronize()?;
        Ok(sum[0])
    }

    /// Puts the table of activations on the device unless it is there already; returns its entries.
    fn tabulate(
        &self,
        scratch: &mut Scratch,
        activations: &[Activation],
        bias: &[f32],
        rows: usize,
    ) -> Result<u32, DeviceError> {
        let same = table_of(activations, bias, rows).flatten().map(f32::to_bits);
        if !same.eq(scratch.table_host.iter().map(|value| value.to_bits())) {
            // Unknown until the copy is queued.
            scratch.table_host.clear();
            let table: Vec<f32> = table_of(activations, bias, rows).flatten().collect();
            self.grow(&mut scratch.table, table.len())?;
            self.stream.memcpy_htod(&table, &mut scratch.table).map_err(|error| self.driver(error))?;
            scratch.table_host = table;
        }
        count("activations", scratch.table_host.len() / 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_alike_share_an_entry() {
        let table =
            |activations: &[Activation], bias: &[f32]| table_of(activations, bias, 2).collect::<Vec<_>>();
        let leaky = Activation::LeakyRelu { slope: 0.5 };
        assert_eq!(table(&[leaky], &[]), [[3.0, 0.5, 0.0, 0.0]]);
        assert_eq!(table(&[leaky], &[1.0, 2.0]), [[3.0, 0.5, 0.0, 1.0], [3.0, 0.5, 0.0, 2.0]]);
        let clip = Activation::Clip { min: -1.0, max: 6.0 };
        assert_eq!(table(&[clip, Activation::Gelu], &[]), [[2.0, -1.0, 6.0, 0.0], [8.0, 0.0, 0.0, 0.0]]);
    }
}
