//! The search for grids on a device: the bits of the host's, in a fraction of its time.
//!
//! Not here: what is searched for and its rules (`quant`), the kernel's arguments (`kernels::search`).

use super::device::{Cuda, count};
use super::kernels::search as kernels;
use crate::device::{Device, DeviceError};
use crate::shape::{area, length};

/// What grids there are to choose from, and how many columns share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GridSearch {
    /// Smallest integer.
    pub qmin: i32,
    /// Largest integer.
    pub qmax: i32,
    /// Whether all zero points are 0.
    pub symmetric: bool,
    /// Columns of a grid; a row's last may be narrower.
    pub width: usize,
}

impl Cuda {
    /// Scale and zero point of every grid of `w: [rows, cols]`, row by row: those that the host finds. `importance: [cols]` is not
    /// negative and not 0 for all of a grid's columns; the weights are finite.
    ///
    /// # Errors
    /// `Length`, `Index`, `OutOfMemory`, `Failed`.
    pub fn search_grids(
        &self,
        (rows, cols): (usize, usize),
        search: GridSearch,
        w: &[f32],
        importance: &[f32],
    ) -> Result<(Vec<f32>, Vec<i32>), DeviceError> {
        length("searched weights", w.len(), area(rows, cols))?;
        length("importance", importance.len(), cols)?;
        let width = search.width.clamp(1, cols.max(1));
        let runs = area(rows, cols.div_ceil(width));
        if runs == 0 {
            return Ok((Vec::new(), Vec::new()));
        }
        let shape = (count("searched rows", rows)?, count("searched columns", cols)?, count("grid", width)?);
        let (w, importance) = (self.upload(&w[..area(rows, cols)])?, self.upload(&importance[..cols])?);
        let (mut scale, mut zero_point) = (self.allocate::<f32>(runs)?, self.allocate::<u32>(runs)?);
        let from = (self.read("searched weights", &w, 0)?, self.read("importance", &importance, 0)?);
        let to =
            (self.written("scales", &mut scale, runs)?, self.written("zero points", &mut zero_point, runs)?);
        self.launch(kernels::search_grids(self.opened.size, shape, runs, search, from, to))?;
        let zero_point = self.bring("zero points", &zero_point, 0..runs)?;
        let scale = self.bring("scales", &scale, 0..runs)?;
        Ok((scale, zero_point.into_iter().map(u32::cast_signed).collect()))
    }
}
