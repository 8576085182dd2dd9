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
    /// `H - C`.
    pub(crate) gap: Other<B>,
    /// `G - C`.
    pub(crate) excess: Other<B>,
    /// `G`.
    pub(crate) energy: Other<B>,
    /// Of the damped H; made when a solve first starts in GPTQ's order.
    factor: Mutex<Option<Arc<Factor<B>>>>,
    /// Of samples, on the host.
    moments: Option<Moments>,
}

/// A matrix that only a chunk's weights are multiplied by, once.
#[derive(Debug)]
pub(crate) enum Other<B> {
    /// It is 0.
    Zero,
    /// Made of the host's statistics whenever it is multiplied: a copy would be as large as they are.
    Host,
    /// On the device.
    Device(B),
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
        let other = |plus: &[f32], minus: Option<&[f32]>| Other::new(device, plus, minus);
        let squares: Vec<f32> = (0..cols).map(|j| h[j * cols + j]).collect();
        let trace: f64 = squares.iter().copied().map(f64::from).sum();
        let damping = (f64::from(fraction) * trace / cols as f64) as f32;
        let (gap, excess, energy) = (other(h, Some(c))?, other(g, Some(c))?, other(g, None)?);
        let mut matrix = h.to_vec();
        matrix.iter_mut().step_by(cols + 1).for_each(|diagonal| *diagonal += damping);
        let mut damped = device.adopt(matrix)?;
        device.share(&mut damped)?;
        Ok(Self {
            cols,
            place: (0, 0),
            fraction,
            damping,
            dead: squares.iter().map(|square| *square == 0.0).collect(),
            squares,
            gap_norm: column_norms(h, c, cols),
            damped,
            gap,
            excess,
            energy,
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

/// Of the columns of `h - c`.
fn column_norms(h: &[f32], c: &[f32], cols: usize) -> Vec<f32> {
    let mut squares = vec![0.0f32; cols];
    for (h, c) in h.chunks_exact(cols).zip(c.chunks_exact(cols)) {
        squares.iter_mut().zip(h).zip(c).for_each(|((square, h), c)| *square += (h - c) * (h - c));
    }
    squares.iter().map(|square| square.sqrt()).collect()
}

impl<B> Other<B> {
    /// `plus - minus`.
    fn new<D: Device<Buffer = B>>(
        device: &D,
        plus: &[f32],
        minus: Option<&[f32]>,
    ) -> Result<Self, DeviceError> {
        if minus.is_some_and(|minus| plus.iter().zip(minus).all(|(plus, minus)| plus - minus == 0.0)) {
            return Ok(Self::Zero);
        }
        if D::IS_HOST {
            return Ok(Self::Host);
        }
        let mut buffer = match minus {
            Some(minus) => {
                device.adopt(plus.iter().zip(minus).map(|(plus, minus)| plus - minus).collect())?
            }
            None => device.upload(plus)?,
        };
        device.share(&mut buffer)?;
        Ok(Self::Device(buffer))
    }

    pub(crate) fn is_zero(&self) -> bool {
        matches!(self, Self::Zero)
    }
}
