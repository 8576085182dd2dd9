//! What objectives are made of on a device: errors of a rounding, and sums over rows.
//!
//! Not here: argument order and grids (`kernels::objective`), what the numbers mean (`solver`).

use super::device::{Cuda, CudaBuffer, count};
use super::kernels::objective as kernels;
use crate::device::{DeviceError, RowTerms};
use crate::shape::area;

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
}
