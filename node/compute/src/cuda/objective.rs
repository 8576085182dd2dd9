//! What objectives are made of on a device: errors of a rounding, sums over rows and runs of them, scaled and copied rows.
//!
//! Not here: argument order and grids (`kernels::objective`), what the numbers mean (`solver`).

use super::device::{Cuda, CudaBuffer, count};
use super::kernels::objective as kernels;
use crate::device::{Device, DeviceError, RowTerms};
use crate::shape::{self, area};

impl Cuda {
    /// See [`crate::Device::rounding_errors`].
    pub(super) fn errors_of(
        &self,
        len: usize,
        low: &CudaBuffer,
        delta: &CudaBuffer,
        up: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let low = self.read("errors low", low, len)?;
        let delta = self.read("errors delta", delta, len)?;
        let (up, out) = (self.read("errors up", up, len)?, self.written("errors out", out, len)?);
        match len {
            0 => Ok(()),
            len => self.launch(kernels::rounding_errors(self.opened.size, len, low, delta, up, out)),
        }
    }

    /// See [`crate::Device::row_sums`].
    pub(super) fn sums_of_rows(
        &self,
        rows: usize,
        cols: usize,
        terms: RowTerms<'_, CudaBuffer>,
    ) -> Result<Vec<[f64; 4]>, DeviceError> {
        let len = area(rows, cols);
        let from = [
            self.read("sums errors", terms.errors, len)?,
            self.read("sums product", terms.product, len)?,
            self.read("sums target", terms.target, len)?,
            self.read("sums roots", terms.roots, cols)?,
            self.read("sums gaps", terms.gaps, cols)?,
        ];
        if len == 0 {
            return Ok(Vec::new());
        }
        let mut sums = self.allocate::<f64>(area(rows, 4))?;
        let to = self.written("row sums", &mut sums, area(rows, 4))?;
        let (count_rows, count_cols) = (count("sums rows", rows)?, count("sums columns", cols)?);
        self.launch(kernels::row_sums(self.opened.size, count_rows, count_cols, from, to))?;
        Ok(self.bring("row sums", &sums, 0..area(rows, 4))?.as_chunks::<4>().0.to_vec())
    }

    /// See [`crate::Device::run_dots`].
    pub(super) fn dots_of_runs(
        &self,
        (rows, cols): (usize, usize),
        width: usize,
        a: &CudaBuffer,
        b: &CudaBuffer,
    ) -> Result<Vec<f64>, DeviceError> {
        let len = area(rows, cols);
        let from = (self.read("dots a", a, len)?, self.read("dots b", b, len)?);
        if len == 0 {
            return Ok(Vec::new());
        }
        let width = width.clamp(1, cols);
        let runs = area(rows, cols.div_ceil(width));
        let mut sums = self.allocate::<f64>(runs)?;
        let to = self.written("dots", &mut sums, runs)?;
        let shape = (count("dots rows", rows)?, count("dots columns", cols)?);
        let of_row = (count("run", width)?, count("runs", cols.div_ceil(width))?);
        self.launch(kernels::run_dots(self.opened.size, shape, of_row, from, to))?;
        self.bring("dots", &sums, 0..runs)
    }

    /// See [`crate::Device::scale_rows`].
    pub(super) fn scaled_rows(
        &self,
        cols: usize,
        by: &[f32],
        source: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let len = area(by.len(), cols);
        let (from, to) = (self.read("scale source", source, len)?, self.written("scale out", out, len)?);
        if len == 0 {
            return Ok(());
        }
        let scales = self.upload(by)?;
        let shape = (count("scale rows", by.len())?, count("scale columns", cols)?);
        let scales = self.read("row scales", &scales, by.len())?;
        self.launch(kernels::scale_rows(self.opened.size, shape, from, scales, to))
    }

    /// See [`crate::Device::copy_rows`].
    pub(super) fn copied_rows(
        &self,
        cols: usize,
        indices: &[u32],
        source: &CudaBuffer,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let limit = source.len.min(out.len) / cols.max(1);
        for &index in indices {
            shape::row("copied row", index, limit)?;
        }
        let (from, to) = (self.read("copy source", source, 0)?, self.written("copy out", out, 0)?);
        if cols == 0 || indices.is_empty() {
            return Ok(());
        }
        let shape = (count("copied rows", indices.len())?, count("copied columns", cols)?);
        let mut scratch = self.scratch();
        let indices = self.place_indices(&mut scratch, indices)?;
        self.launch(kernels::copy_rows(self.opened.size, shape, from, indices, to))
    }
}
