//! A layer's statistics on a device, made once and read by the solves of all its chunks.
//!
//! A device holds H (damped), C and G as they came: differences are made of them where they are multiplied, so nothing that the
//! host would have to compute first stands in anybody's way. A host multiplies the statistics themselves.
//!
//! Not here: what depends on the rows (`quadratic`, `samples`).

use std::sync::{Arc, Mutex, PoisonError};

use halfstep_compute::{Device, DeviceError, Steering, cpu};

use crate::check::{check_diagonal, check_shapes, check_statistics};
use crate::gptq::Factor;
use crate::problem::GramView;
use crate::samples::Moments;
use crate::workspace::Arrays;
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
    /// Their roots.
    pub(crate) roots: B,
    /// Euclidean norms of the columns of H - C.
    pub(crate) gap_norm: B,
    /// Whether H is C.
    pub(crate) gap_is_zero: bool,
    /// `H + d I`.
    pub(crate) damped: B,
    /// The rest, on a device; a host makes what it needs of the statistics themselves.
    device: Option<OnDevice<B>>,
    /// Of the damped H; made when a solve first starts in GPTQ's order.
    factor: Mutex<Option<Arc<Factor<B>>>>,
    /// Of the damped H. Whether it was made, which the first solve that learns does; then what the device made, nothing if it
    /// multiplies H itself.
    steering: Mutex<Option<Option<Arc<Steering<B>>>>>,
    /// Of samples, on the host.
    moments: Option<Moments>,
}

/// What a device has besides `H + d I`.
#[derive(Debug)]
pub(crate) struct OnDevice<B> {
    /// Of H, undamped.
    diagonal: B,
    /// C, unless it is H.
    pub(crate) c: Option<B>,
    /// G, unless it is H.
    g: Option<B>,
}

/// What the objective is made of besides the linear term, of each row.
pub(crate) struct Terms {
    /// `w (H - 2 C + G) w'`.
    pub(crate) constant: Vec<f64>,
    /// `w G w'`.
    pub(crate) energy: Vec<f64>,
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
        let prepared = match statistics {
            Statistics::Gram(view) if !D::IS_HOST => {
                check_shapes(view, cols)?;
                Self::on(device, *view, cols, settings.damping)?
            }
            Statistics::Gram(view) => {
                check_statistics(statistics, cols)?;
                Self::of(device, *view, cols, settings.damping)?
            }
            Statistics::Samples(view) => {
                check_statistics(statistics, cols)?;
                let moments = Moments::of(device, *view, cols)?;
                let prepared = match D::IS_HOST {
                    true => Self::of(device, moments.view(), cols, settings.damping)?,
                    false => Self::on(device, moments.view(), cols, settings.damping)?,
                };
                Self { moments: Some(moments), ..prepared }
            }
        };
        Ok(Self { place: place(statistics), ..prepared })
    }

    /// On the host. The statistics have been checked.
    fn of<D: Device<Buffer = B>>(
        device: &D,
        view: GramView<'_>,
        cols: usize,
        fraction: f32,
    ) -> Result<Self, SolveError> {
        let GramView { h, c, .. } = view;
        let (squares, damping) = damping(h, cols, fraction);
        let mut matrix = h.to_vec();
        matrix.iter_mut().step_by(cols + 1).for_each(|diagonal| *diagonal += damping);
        let mut damped = device.adopt(matrix)?;
        device.share(&mut damped)?;
        let (gaps, differ) = cpu::column_gaps(cols, h, c);
        Self::new_of(device, cols, (fraction, damping), squares, gaps, !differ, damped, None)
    }

    /// On a device, which also looks for what is not finite. The statistics' shapes have been checked.
    fn on<D: Device<Buffer = B>>(
        device: &D,
        view: GramView<'_>,
        cols: usize,
        fraction: f32,
    ) -> Result<Self, SolveError> {
        let GramView { h, c, g_energy, .. } = view;
        let (squares, damping) = damping(h, cols, fraction);
        let finite = |matrix: &B| match device.all_finite(cols * cols, matrix)? {
            true => Ok(()),
            // The host finds the entry.
            false => check_statistics(&Statistics::Gram(view), cols),
        };
        let mut damped = device.upload(h)?;
        finite(&damped)?;
        let (mut gaps, mut differ) = (vec![0.0; cols], false);
        let mut c = if std::ptr::eq(c, h) { None } else { Some(device.upload(c)?) };
        if let Some(c) = &mut c {
            finite(c)?;
            (gaps, differ) = device.column_gaps(cols, &damped, c)?;
            device.share(c)?;
        }
        let c = c.filter(|_| differ);
        let mut g = match g_energy {
            Some(g) if !std::ptr::eq(g, h) => Some(device.upload(g)?),
            _ => None,
        };
        if let Some(g) = &mut g {
            finite(g)?;
            device.share(g)?;
        }
        check_diagonal(&view, cols)?;
        let raised: Vec<f32> = squares.iter().map(|square| square + damping).collect();
        device.set_diagonal(cols, &device.upload(&raised)?, &mut damped)?;
        device.share(&mut damped)?;
        let mut diagonal = device.upload(&squares)?;
        device.share(&mut diagonal)?;
        let rest = OnDevice { diagonal, c, g };
        Self::new_of(device, cols, (fraction, damping), squares, gaps, !differ, damped, Some(rest))
    }

    fn new_of<D: Device<Buffer = B>>(
        device: &D,
        cols: usize,
        (fraction, damping): (f32, f32),
        squares: Vec<f32>,
        gaps: Vec<f32>,
        gap_is_zero: bool,
        damped: B,
        rest: Option<OnDevice<B>>,
    ) -> Result<Self, SolveError> {
        let root = |squares: &[f32]| -> Result<B, DeviceError> {
            let mut roots = device.adopt(squares.iter().map(|square| square.sqrt()).collect())?;
            device.share(&mut roots)?;
            Ok(roots)
        };
        Ok(Self {
            cols,
            place: (0, 0),
            fraction,
            damping,
            dead: squares.iter().map(|square| *square == 0.0).collect(),
            roots: root(&squares)?,
            squares,
            gap_norm: root(&gaps)?,
            gap_is_zero,
            damped,
            device: rest,
            factor: Mutex::new(None),
            steering: Mutex::new(None),
            moments: None,
        })
    }

    /// What there is on a device that is not the host.
    pub(crate) fn on_device(&self) -> Option<&OnDevice<B>> {
        self.device.as_ref()
    }

    /// H on a device.
    pub(crate) fn undamped<'a>(&'a self, rest: &'a OnDevice<B>) -> halfstep_compute::Moments<'a, B> {
        halfstep_compute::Moments { matrix: &self.damped, diagonal: Some(&rest.diagonal) }
    }

    /// Puts the linear term of weights `w: [rows, cols]` in `arrays.linear`; `moments` are those that this was made from.
    pub(crate) fn weights_times<D: Device<Buffer = B>>(
        &self,
        device: &D,
        w: &[f32],
        rows: usize,
        moments: GramView<'_>,
        arrays: &mut Arrays<B>,
    ) -> Result<Terms, DeviceError> {
        let cols = self.cols;
        let Some(rest) = &self.device else {
            return self.weights_times_host(device, w, rows, moments, arrays);
        };
        let Arrays { soft, product, linear, .. } = arrays;
        device.write(w, soft)?;
        let h = self.undamped(rest);
        let g = rest.g.as_ref().map(|g| halfstep_compute::Moments { matrix: g, diagonal: None });
        let gap = match &rest.c {
            None => {
                device.clear(rows * cols, linear)?;
                vec![0.0; rows]
            }
            Some(c) => {
                device.multiply_moments(rows, cols, soft, h, Some(c), linear)?;
                device.run_dots(rows, cols, cols, linear, soft)?
            }
        };
        let mut dots = |plus, minus: Option<&B>, sign: f64| {
            device.multiply_moments(rows, cols, soft, plus, minus, product)?;
            let dots = device.run_dots(rows, cols, cols, product, soft)?;
            Ok::<_, DeviceError>(dots.into_iter().map(|dot| sign * dot).collect::<Vec<f64>>())
        };
        let excess = match (&rest.g, g, &rest.c) {
            (Some(_), Some(plus), Some(c)) => Some(dots(plus, Some(c), 1.0)?),
            // C is H, whose own diagonal only the first of a difference can have.
            (Some(g), ..) => Some(dots(h, Some(g), -1.0)?),
            _ => None,
        };
        Ok(Terms { energy: dots(g.unwrap_or(h), None, 1.0)?, constant: constant(gap, excess) })
    }

    fn weights_times_host<D: Device<Buffer = B>>(
        &self,
        device: &D,
        w: &[f32],
        rows: usize,
        moments: GramView<'_>,
        arrays: &mut Arrays<B>,
    ) -> Result<Terms, DeviceError> {
        let (GramView { h, c, g_energy, .. }, cols) = (moments, self.cols);
        let Arrays { linear, host, .. } = arrays;
        let mut times = |plus: &[f32], minus: Option<&[f32]>, keep: Option<&mut B>| {
            host.resize(rows * cols, 0.0);
            cpu::multiply_moments(rows, cols, w, plus, minus, host);
            if let Some(keep) = keep {
                device.write(host, keep)?;
            }
            Ok::<_, DeviceError>(cpu::run_dots(host, w, cols).collect::<Vec<f64>>())
        };
        let excess = g_energy.map(|g| times(g, Some(c), None)).transpose()?;
        let energy = times(g_energy.unwrap_or(h), None, None)?;
        let gap = if self.gap_is_zero { vec![0.0; rows] } else { times(h, Some(c), Some(&mut *linear))? };
        if self.gap_is_zero {
            device.clear(rows * cols, linear)?;
        }
        Ok(Terms { constant: constant(gap, excess), energy })
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

    /// What the iterations of AdaRound multiply by, if not by the damped H itself. Whoever comes while it is made waits for it.
    pub(crate) fn steering<D: Device<Buffer = B>>(
        &self,
        device: &D,
    ) -> Result<Option<Arc<Steering<B>>>, DeviceError> {
        let mut steering = self.steering.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = &*steering {
            return Ok(made.clone());
        }
        let diagonal: Vec<f32> = self.squares.iter().map(|square| square + self.damping).collect();
        let made = device.steering(self.cols, &self.damped, &diagonal)?.map(Arc::new);
        Ok(steering.insert(made).clone())
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

/// `w (H - C) w' + w (G - C) w'`, where the second is the first if there is no G.
fn constant(gap: Vec<f64>, excess: Option<Vec<f64>>) -> Vec<f64> {
    let excess = excess.unwrap_or_else(|| gap.clone());
    gap.into_iter().zip(excess).map(|(gap, excess)| gap + excess).collect()
}

/// Where statistics lie in memory and how long they are: enough to notice when they are others.
fn place(statistics: &Statistics<'_>) -> (usize, usize) {
    let values = match statistics {
        Statistics::Gram(view) => view.h,
        Statistics::Samples(view) => view.x_q,
    };
    (values.as_ptr() as usize, values.len())
}

/// The diagonal of `h`, and what is added to it.
fn damping(h: &[f32], cols: usize, fraction: f32) -> (Vec<f32>, f32) {
    let squares: Vec<f32> = (0..cols).map(|j| h[j * cols + j]).collect();
    let trace: f64 = squares.iter().copied().map(f64::from).sum();
    (squares, (f64::from(fraction) * trace / cols as f64) as f32)
}
