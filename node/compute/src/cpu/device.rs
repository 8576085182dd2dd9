//! The CPU behind the device interface: shapes checked, then the plain functions of this folder.
//!
//! Not here: the interface (`crate::device`), the functions.

use std::ops::{Deref, DerefMut, Range};

use crate::activation::{self, Activation};
use crate::cpu;
use crate::cpu::step::{Gradient, StepArgs};
use crate::device::{
    Device, DeviceError, MatMut, MatRef, Moments, PlaneBuffers, Product, RefineShape, RowTerms, StepBuffers,
    StepGradient,
};
use crate::shape::{self, area, span};

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

    fn clear(&self, len: usize, buffer: &mut CpuBuffer) -> Result<(), DeviceError> {
        first_mut("clear", buffer, len)?.fill(0.0);
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

    fn rounding_errors(
        &self,
        len: usize,
        low: &CpuBuffer,
        delta: &CpuBuffer,
        up: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<(), DeviceError> {
        let (low, delta) = (first("errors low", low, len)?, first("errors delta", delta, len)?);
        cpu::rounding_errors(low, delta, first("errors up", up, len)?, first_mut("errors out", out, len)?);
        Ok(())
    }

    fn row_sums(
        &self,
        rows: usize,
        cols: usize,
        terms: RowTerms<'_, CpuBuffer>,
    ) -> Result<Vec<[f64; 4]>, DeviceError> {
        let len = area(rows, cols);
        let errors = first("sums errors", terms.errors, len)?;
        let product = first("sums product", terms.product, len)?;
        let target = first("sums target", terms.target, len)?;
        let (roots, gaps) = (first("sums roots", terms.roots, cols)?, first("sums gaps", terms.gaps, cols)?);
        if cols == 0 {
            // Rows without columns may be any number: nothing is kept of them.
            return Ok(Vec::new());
        }
        let lines = errors.chunks_exact(cols).zip(product.chunks_exact(cols)).zip(target.chunks_exact(cols));
        Ok(lines.map(|((e, product), target)| cpu::row_sums(e, product, target, roots, gaps)).collect())
    }

    fn run_dots(
        &self,
        rows: usize,
        cols: usize,
        width: usize,
        a: &CpuBuffer,
        b: &CpuBuffer,
    ) -> Result<Vec<f64>, DeviceError> {
        let (a, b) = (first("dots a", a, area(rows, cols))?, first("dots b", b, area(rows, cols))?);
        if a.is_empty() {
            return Ok(Vec::new());
        }
        let lines = a.chunks_exact(cols).zip(b.chunks_exact(cols));
        Ok(lines.flat_map(|(a, b)| cpu::run_dots(a, b, width.max(1))).collect())
    }

    fn scale_rows(
        &self,
        cols: usize,
        by: &[f32],
        source: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<(), DeviceError> {
        let len = area(by.len(), cols);
        let (source, out) = (first("scale source", source, len)?, first_mut("scale out", out, len)?);
        let lines = out.chunks_exact_mut(cols.max(1)).zip(source.chunks_exact(cols.max(1)));
        for ((out, source), by) in lines.zip(by) {
            out.iter_mut().zip(source).for_each(|(out, value)| *out = value * by);
        }
        Ok(())
    }

    fn copy_rows(
        &self,
        cols: usize,
        indices: &[u32],
        source: &CpuBuffer,
        out: &mut CpuBuffer,
    ) -> Result<(), DeviceError> {
        let limit = source.len().min(out.len()) / cols.max(1);
        for &index in indices {
            let row = shape::row("copied row", index, limit)? * cols;
            out[row..row + cols].copy_from_slice(&source[row..row + cols]);
        }
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
    /// Nothing is as long as its rows are many.
    #[test]
    fn rows_without_columns_take_no_time() {
        let (a, mut out) = (upload(&[1.0; 4]), upload(&[0.0; 4]));
        let (mut up, mut flips) = (a.clone(), a.clone());
        for rows in [1 << 40, usize::MAX] {
            let mut product = |m, n, k| {
                let (lhs, rhs) = (MatRef::new(&a, k), MatRef::new(&a, n));
                Cpu.matmul(Product::new(m, n, k), lhs, rhs, MatMut { buffer: &mut out, offset: 0, stride: n })
            };
            let _ = (product(rows, 0, 0), product(rows, 0, 1), product(0, 0, rows));
            Cpu.gram(&a, rows, 0, &mut out).unwrap();
            let shape = RefineShape { rows, cols: 0, block: 0..0 };
            Cpu.refine_block(&shape, &a, &a, &a, &mut up, &mut flips).unwrap();
            let buffers = PlaneBuffers { low: &a, delta: &a, offset: &a };
            Cpu.plane_block(rows, 0, 0..0, &a, buffers, &mut up, &mut flips).unwrap();
            Cpu.gather_columns(&a, rows, &[], &mut out).unwrap();
            Cpu.activation_residual(&[Activation::Relu], &[], rows, 0, &mut out, &a).unwrap();
            let moments = Moments { matrix: &a, diagonal: None };
            Cpu.multiply_moments(rows, 0, &a, moments, None, &mut out).unwrap();
            assert!(Cpu.exact_differences(rows, 0, (&a, &a), moments, None).unwrap().is_empty());
            assert!(Cpu.normal_equations(rows, 0, 1, &a, &a, &mut out).unwrap().is_empty());
        }
    }

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
            let _ = Cpu.rounding_errors(k, &a, &b, &up, &mut out);
            let terms = RowTerms { errors: &a, product: &b, target: &a, roots: &b, gaps: &a };
            let _ = Cpu.row_sums(m, k, terms);
            let _ = Cpu.descend(2, m, k, &b, &mut out, &a, &mut up, &mut flips);
        }
    }
}
