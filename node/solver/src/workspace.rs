//! Device arrays that live across solves: iterations allocate nothing, nor do chunks no larger than an earlier one.
//!
//! Not here: what is in them (`quadratic`, `refine`, `samples`).

use halfstep_compute::{Device, DeviceError, cpu};

/// The device arrays of one chunk shape, `[rows, cols]` each.
#[derive(Debug)]
pub(crate) struct Arrays<B> {
    /// Lower errors, in row units.
    pub(crate) low: B,
    /// Scales, in row units; 0: fixed.
    pub(crate) delta: B,
    /// The linear term `w (H - C)`, plain units.
    pub(crate) linear: B,
    /// Minus the linear term, in row units.
    pub(crate) target: B,
    /// Soft errors.
    pub(crate) soft: B,
    /// `soft * h`, also the residual of refinement.
    pub(crate) product: B,
    /// Rounding variables; in refinement the choices.
    pub(crate) v: B,
    /// Adam's moments; while scales are fitted the first is each row's best `errors * h`.
    pub(crate) m1: B,
    pub(crate) m2: B,
    /// Flips of one block, `[rows, REFINE_BLOCK]`.
    pub(crate) flips: B,
    /// Scratch on the host: a fresh array of this size costs more than filling it.
    pub(crate) host: Vec<f32>,
}

impl<B> Arrays<B> {
    fn new<D: Device<Buffer = B>>(device: &D, size: Size) -> Result<Self, DeviceError> {
        Ok(Self {
            low: device.zeros(size.area)?,
            delta: device.zeros(size.area)?,
            linear: device.zeros(size.area)?,
            target: device.zeros(size.area)?,
            soft: device.zeros(size.area)?,
            product: device.zeros(size.area)?,
            v: device.zeros(size.area)?,
            m1: device.zeros(size.area)?,
            m2: device.zeros(size.area)?,
            flips: device.zeros(size.flips)?,
            host: Vec::new(),
        })
    }
}

/// Elements of each kind of array.
#[derive(Debug, Clone, Copy, Default)]
struct Size {
    area: usize,
    flips: usize,
}

/// The steps of a solve, for whoever times it or waits for it: the solver reads no clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// An iteration of AdaRound or a sweep of coordinate descent is done. All others begin what they name.
    Iterate,
    /// The chunk's neighbours on the grid, and its products with the statistics.
    Multiply,
    /// The start in GPTQ's order, and its factor if that is not there yet.
    Start,
    /// AdaRound.
    Learn,
    /// Coordinate descent.
    Refine,
    /// Candidates are measured.
    Choose,
    /// Rows whose f32 values are too close are compared in f64.
    Guard,
    /// What was chosen is measured again, for scales to be fitted to it.
    Measure,
    /// Scales are fitted to the integers.
    Fit,
    /// Integers are refined and measured on the fitted scales.
    Regrid,
    /// The chunk is solved.
    Done,
}

/// Told of each step as it comes.
pub(crate) type Watch<'a> = &'a mut dyn FnMut(Step);

/// Everything a solve needs besides the problem; reuse it from chunk to chunk. `B` is the device's buffer.
#[derive(Debug)]
pub struct Workspace<B> {
    arrays: Option<Arrays<B>>,
    size: Size,
}

impl<B> Default for Workspace<B> {
    fn default() -> Self {
        Self { arrays: None, size: Size::default() }
    }
}

impl<B> Workspace<B> {
    /// An empty workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// The arrays, at least as large as the shape needs; their contents are left over from earlier solves.
    pub(crate) fn arrays<D: Device<Buffer = B>>(
        &mut self,
        device: &D,
        rows: usize,
        cols: usize,
    ) -> Result<&mut Arrays<B>, DeviceError> {
        let needed =
            Size { area: rows.saturating_mul(cols), flips: rows.saturating_mul(cols.min(cpu::REFINE_BLOCK)) };
        let fits = needed.area <= self.size.area && needed.flips <= self.size.flips;
        let kept = if fits { self.arrays.take() } else { None };
        let arrays = match kept {
            Some(arrays) => arrays,
            None => {
                // The old arrays go before the new ones come: both at once might not fit.
                self.arrays = None;
                self.size = needed;
                Arrays::new(device, needed)?
            }
        };
        Ok(self.arrays.insert(arrays))
    }
}
