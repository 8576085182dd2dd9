//! AdaRound's iterations in half precision: H and errors brought into its range by powers of two, products in f32.
//!
//! Half precision has the 11 bits of TF32, twice its rate and half its bytes. Not here: scales (`cpu::scaled`), what is learned
//! (`solver`).
#![expect(unsafe_code, reason = "products on raw device addresses, checked here")]

use super::blas::WORKSPACE_BYTES;
use super::column_major::ColumnMajor;
use super::device::{Cuda, CudaBuffer, Precision, count};
use super::kernels::learn as kernels;
use crate::cpu;
use crate::cpu::step::StepArgs;
use crate::device::{Device, DeviceError, LearnBuffers, Product, Steering};
use crate::shape::area;

/// Elements of f32 that hold so many halves.
fn elements(halves: usize) -> usize {
    halves.div_ceil(2)
}

impl Cuda {
    /// See [`Device::steering`]: nothing where all bits are asked for.
    pub(super) fn halves_of_h(
        &self,
        cols: usize,
        h: &CudaBuffer,
        diagonal: &[f32],
    ) -> Result<Option<Steering<CudaBuffer>>, DeviceError> {
        crate::shape::length("steering diagonal", diagonal.len(), cols)?;
        let from = self.read("steering h", h, area(cols, cols))?;
        if self.opened.precision == Precision::F32 || cols == 0 {
            return Ok(None);
        }
        let scales = cpu::column_scales(&diagonal[..cols]);
        let inverse: Vec<f32> = scales.iter().map(|scale| 1.0 / scale).collect();
        let (mut scales, inverse) = (self.upload(&scales)?, self.upload(&inverse)?);
        let mut halves = self.allocate::<f32>(elements(area(cols, cols)))?;
        let shape = (count("steering rows", cols)?, count("steering columns", cols)?);
        let by = self.read("steering scales", &inverse, cols)?;
        let to = self.written("steering", &mut halves, elements(area(cols, cols)))?;
        self.launch(kernels::scaled_halves(self.opened.size, shape, from, (by, by), to))?;
        self.share(&mut scales)?;
        self.share(&mut halves)?;
        Ok(Some(Steering { cols, scales, halves }))
    }

    /// See [`Device::learn`]. `soft` is where the first errors come from; later ones are kept in half precision only.
    pub(super) fn learn_in_halves(
        &self,
        (rows, cols): (usize, usize),
        steering: &Steering<CudaBuffer>,
        buffers: LearnBuffers<'_, CudaBuffer>,
        steps: &mut dyn Iterator<Item = StepArgs>,
    ) -> Result<(), DeviceError> {
        let LearnBuffers { lo, delta, target, v, m1, m2, soft, product } = buffers;
        let len = area(rows, cols);
        if steering.cols != cols {
            let (operand, columns) = ("learn h", cols);
            return Err(DeviceError::Stride { operand, stride: steering.cols, columns });
        }
        let [lo, delta, target, soft] =
            [("learn lo", lo), ("learn delta", delta), ("learn target", target), ("learn soft", &*soft)]
                .map(|(operand, buffer)| self.read(operand, buffer, len));
        let (lo, delta, target, soft) = (lo?, delta?, target?, soft?);
        let by_column = self.read("learn scales", &steering.scales, cols)?;
        let h = self.read("learn h", &steering.halves, elements(area(cols, cols)))?;
        let [v, m1, m2, product] =
            [("learn v", v), ("learn m1", m1), ("learn m2", m2), ("learn product", product)]
                .map(|(operand, buffer)| self.written(operand, buffer, len));
        let (v, m1, m2, product) = (v?, m1?, m2?, product?);
        if len == 0 {
            return Ok(());
        }
        let (mut row_scales, mut halves) = (self.allocate::<f32>(rows)?, self.allocate::<u16>(len)?);
        let by_row = self.written("learn row scales", &mut row_scales, rows)?;
        let errors = self.written("learn errors", &mut halves, len)?;
        let (shape, size) = ((count("learn rows", rows)?, count("learn columns", cols)?), self.opened.size);
        self.launch(kernels::row_scales(size, shape, (lo, delta), by_column, by_row))?;
        self.launch(kernels::scaled_halves(size, shape, soft, (by_row, by_column), errors))?;
        // H is symmetric: read as its transpose, both factors lie along the sums.
        let args = ColumnMajor::new(Product::new(rows, cols, cols), (cols, false), (cols, true), cols)?;
        let state = kernels::HalvesState { product, target, lo, delta, by_row, by_column, v, m1, m2, errors };
        for step in steps {
            self.opened.context.bind_to_thread().map_err(|error| self.driver(error))?;
            // SAFETY: `h` holds `cols` times `cols` halves, `errors` `rows` times `cols`, `product` as many f32; the last was
            // borrowed mutably and the errors were made here, so neither overlaps another.
            unsafe { self.blas.product_f16(&args, h, errors, product) }
                .map_err(|error| self.opened.subject(WORKSPACE_BYTES).blas(error))?;
            self.launch(kernels::step_halves(size, shape, state, &step))?;
        }
        Ok(())
    }
}
