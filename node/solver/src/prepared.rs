//! A layer's statistics on a device, made once and read by the solves of all its chunks.
//!
//! Not here: what depends on the rows (`quadratic`, `samples`).

use std::sync::{Arc, Mutex, PoisonError};

use halfstep_compute::{Device, DeviceError};

use crate::check::check_statistics;
use crate::gptq::Factor;
use crate::problem::GramView;
use crate::samples::Moments;
use crate::{RowProblem, Settings, SolveError, Statistics};

/// See the module. `B` is the device's buffer; lanes of one device share it.
#[derive(Debug)]
pub struct Prepared<B> {
    cols: usize,
    /// Of the statistics, and the damping, it was made from: solves with others are refused.
    place: (usize, usize),
    fraction: f32,
    /// `d`: what is added to the diagonal of H.
    pub(crate) damping: f32,
    /// Columns whose input is always 0.
    pub(crate) dead: Vec<bool>,
    /// Mean squares of the inputs: the diagonal of H, undamped.
    pub(crate) squares: Vec<f32>,
    /// Euclidean norms of the columns of H - C.
    pub(crate) gap_norm: Vec<f32>,
    /// `H + d I`.
    pub(crate) damped: B,
    /// `H - C`; nothing if it is 0.
    pub(crate) gap: Option<B>,
    /// `G - C`; nothing if it is 0.
    pub(crate) excess: Option<B>,
    /// `G`.
    pub(crate) energy: B,
    /// Of the damped H; made when a solve first starts in GPTQ's order.
    factor: Mutex<Option<Arc<Factor<B>>>>,
    /// Of samples, on the host.
    moments: Option<Moments>,
}

impl<B: Send + Sync> Prepared<B> {
    /// Puts statistics of `cols` inputs on a device. Only the damping of `settings` counts.
    ///
    /// # Errors
    /// `Length`, `NonFinite`, `NegativeDiagonal`, `NoSamples`, `Setting`, `Device`.
    pub fn new<D: Device<Buffer = B>>(
        device: &D,
        statistics: &Statistics<'_>,
        cols: usize,
        settings: &Settings,
    ) -> Result<Self, SolveError> {
        settings.validate()?;
        check_statistics(statistics, cols)?;
        let prepared = match statistics {
            Statistics::Gram(view) => Self::of(device, *view, cols, settings.damping)?,
            Statistics::Samples(view) => {
                let moments = Moments::of(device, *view, cols)?;
                let prepared = Self::of(device, moments.view(), cols, settings.damping)?;
                Self { moments: Some(moments), ..prepared }
            }
        };
        Ok(Self { place: place(statistics), ..prepared })
    }

    fn of<D: Device<Buffer = B>>(
        device: &D,
        view: GramView<'_>,
        cols: usize,
        fraction: f32,
    ) -> Result<Self, SolveError> {
        let GramView { h, c, .. } = view;
        let g = view.g_energy.unwrap_or(h);
        let shared = |matrix: &[f32]| {
            let mut buffer = device.upload(matrix)?;
            device.share(&mut buffer)?;
            Ok::<_, SolveError>(buffer)
        };
        let unless_zero = |matrix: &[f32]| match matrix.iter().all(|value| *value == 0.0) {
            true => Ok(None),
            false => shared(matrix).map(Some),
        };
        let squares: Vec<f32> = (0..cols).map(|j| h[j * cols + j]).collect();
        let trace: f64 = squares.iter().copied().map(f64::from).sum();
        let damping = (f64::from(fraction) * trace / cols as f64) as f32;
        let mut matrix: Vec<f32> = h.iter().zip(c).map(|(h, c)| h - c).collect();
        let (gap_norm, gap) = (column_norms(&matrix, cols), unless_zero(&matrix)?);
        matrix.iter_mut().zip(g).zip(c).for_each(|((value, g), c)| *value = g - c);
        let excess = unless_zero(&matrix)?;
        matrix.copy_from_slice(h);
        matrix.iter_mut().step_by(cols + 1).for_each(|diagonal| *diagonal += damping);
        Ok(Self {
            cols,
            place: (0, 0),
            fraction,
            damping,
            dead: squares.iter().map(|square| *square == 0.0).collect(),
            squares,
            gap_norm,
            damped: shared(&matrix)?,
            gap,
            excess,
            energy: shared(g)?,
            factor: Mutex::new(None),
            moments: None,
        })
    }

    /// The factor that GPTQ's order needs; `h` is what this was made from. Whoever comes while it is made waits for it.
    pub(crate) fn factor<D: Device<Buffer = B>>(
        &self,
        device: &D,
        h: &[f32],
    ) -> Result<Arc<Factor<B>>, DeviceError> {
        // It is there whole or not at all.
        let mut factor = self.factor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = &*factor {
            return Ok(Arc::clone(made));
        }
        let made = Arc::new(Factor::new(device, h, &self.damped, self.cols, self.damping)?);
        Ok(Arc::clone(factor.insert(made)))
    }

    /// The second moments behind a problem that this was made for: its own, or those of its samples.
    pub(crate) fn moments<'a>(
        &'a self,
        problem: &RowProblem<'a>,
        settings: &Settings,
    ) -> Result<GramView<'a>, SolveError> {
        if settings.damping.to_bits() != self.fraction.to_bits() {
            return Err(SolveError::Setting {
                name: "damping",
                value: settings.damping.to_string(),
                expected: "the one that the statistics were prepared with",
            });
        }
        match (problem.statistics, &self.moments) {
            _ if problem.cols != self.cols || place(&problem.statistics) != self.place => {
                Err(SolveError::Unprepared)
            }
            (Statistics::Gram(view), None) => Ok(view),
            (Statistics::Samples(_), Some(moments)) => Ok(moments.view()),
            _ => Err(SolveError::Unprepared),
        }
    }
}

/// Where statistics lie in memory and how long they are: enough to notice when they are others.
fn place(statistics: &Statistics<'_>) -> (usize, usize) {
    let values = match statistics {
        Statistics::Gram(view) => view.h,
        Statistics::Samples(view) => view.x_q,
    };
    (values.as_ptr() as usize, values.len())
}

fn column_norms(matrix: &[f32], cols: usize) -> Vec<f32> {
    let mut squares = vec![0.0f32; cols];
    for line in matrix.chunks_exact(cols) {
        squares.iter_mut().zip(line).for_each(|(square, value)| *square += value * value);
    }
    squares.iter().map(|square| square.sqrt()).collect()
}
