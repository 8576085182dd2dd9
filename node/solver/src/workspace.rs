//! Device arrays that live across solves: iterations allocate nothing, nor do chunks no larger than an earlier one.
//!
//! Not here: what is in them (`quadratic`, `refine`, `samples`).

use halfstep_compute::{Device, DeviceError, cpu};

/// The device arrays of one chunk shape. Square ones are `[cols, cols]`, the others `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct Arrays<B> {
    /// Damped H.
    pub(crate) h: B,
    /// Lower errors, in row units.
    pub(crate) low: B,
    /// Scales, in row units; 0: fixed.
    pub(crate) delta: B,
    /// Minus the linear term, in row units.
    pub(crate) target: B,
    /// Soft errors.
    pub(crate) soft: B,
    /// `soft * h`, also the residual of refinement.
    pub(crate) product: B,
    /// Rounding variables; in refinement the choices.
    pub(crate) v: B,
    /// Adam's moments.
    pub(crate) m1: B,
    pub(crate) m2: B,
    /// Flips of one block, `[rows, REFINE_BLOCK]`.
    pub(crate) flips: B,
}

impl<B> Arrays<B> {
    fn new<D: Device<Buffer = B>>(device: &D, size: Size) -> Result<Self, DeviceError> {
        Ok(Self {
            h: device.zeros(size.square)?,
            low: device.zeros(size.area)?,
            delta: device.zeros(size.area)?,
            target: device.zeros(size.area)?,
            soft: device.zeros(size.area)?,
            product: device.zeros(size.area)?,
            v: device.zeros(size.area)?,
            m1: device.zeros(size.area)?,
            m2: device.zeros(size.area)?,
            flips: device.zeros(size.flips)?,
        })
    }
}

/// Elements of each kind of array.
#[derive(Debug, Clone, Copy, Default)]
struct Size {
    area: usize,
    square: usize,
    flips: usize,
}

/// The steps of a solve that are worth timing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Coordinate descent begins.
    Refine,
    /// Coordinate descent is over; candidates are compared.
    Choose,
}

/// Told of each step as it begins. The caller may read a clock; the solver has none.
#[derive(Default)]
pub(crate) struct Watch(Option<Box<dyn FnMut(Step) + Send>>);

impl Watch {
    pub(crate) fn tell(&mut self, step: Step) {
        if let Some(watch) = &mut self.0 {
            watch(step);
        }
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Watch" } else { "no watch" })
    }
}

/// Everything a solve needs besides the problem; reuse it from chunk to chunk. `B` is the device's buffer.
#[derive(Debug)]
pub struct Workspace<B> {
    arrays: Option<Arrays<B>>,
    size: Size,
    pub(crate) watch: Watch,
}

impl<B> Default for Workspace<B> {
    fn default() -> Self {
        Self { arrays: None, size: Size::default(), watch: Watch::default() }
    }
}

impl<B> Workspace<B> {
    /// An empty workspace.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `watch` at each step of the next solve.
    pub fn watch_next(&mut self, watch: impl FnMut(Step) + Send + 'static) {
        self.watch = Watch(Some(Box::new(watch)));
    }

    /// The arrays, at least as large as the shape needs; their contents are left over from earlier solves.
    pub(crate) fn arrays<D: Device<Buffer = B>>(
        &mut self,
        device: &D,
        rows: usize,
        cols: usize,
    ) -> Result<&mut Arrays<B>, DeviceError> {
        let needed = Size {
            area: rows.saturating_mul(cols),
            square: cols.saturating_mul(cols),
            flips: rows.saturating_mul(cols.min(cpu::REFINE_BLOCK)),
        };
        let fits = needed.area <= self.size.area
            && needed.square <= self.size.square
            && needed.flips <= self.size.flips;
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn a_watch_hears_each_step_once_and_a_workspace_without_one_is_silent() {
        let heard: Arc<Mutex<Vec<Step>>> = Arc::default();
        let mut workspace = Workspace::<Vec<f32>>::new();
        workspace.watch.tell(Step::Refine);
        let ear = Arc::clone(&heard);
        workspace.watch_next(move |step| ear.lock().unwrap().push(step));
        let mut watch = std::mem::take(&mut workspace.watch);
        watch.tell(Step::Refine);
        watch.tell(Step::Choose);
        workspace.watch.tell(Step::Choose);
        assert_eq!(*heard.lock().unwrap(), [Step::Refine, Step::Choose]);
    }
}
