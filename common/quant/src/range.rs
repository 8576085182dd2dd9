//! Chooses scales and zero points for a weight matrix: the entry point of all range estimators.
//!
//! In: weights `[rows, cols]`, a [`GridSpec`]. Out: [`Encodings`]. Each grid (tensor, row or group) is its own problem.
//! Stated rules: a grid whose weights are all 0 gets scale 1 and zero point 0; no scale is below [`SCALE_MIN`]; real
//! zero is always on the grid; NaN or infinite weights are refused with their position.
//! Not here: the searches behind MSE (`mse_search`) and enhanced (`enhanced`).

use crate::encodings::{check_length, element_count};
use crate::enhanced::{self, Histogram};
use crate::{Encodings, Granularity, GridSpec, QuantError, RangeEstimator, Scheme, mse_search};

/// Smallest scale that is ever chosen: normal, and with a finite reciprocal. Weights far below it become 0.
pub const SCALE_MIN: f32 = 4.0 * f32::MIN_POSITIVE;

/// Scale and zero point of one grid.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Entry {
    pub(crate) scale: f32,
    pub(crate) zero_point: i32,
}

/// The integers of a grid, before a zero point is chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Integers {
    pub(crate) scheme: Scheme,
    pub(crate) qmin: i32,
    pub(crate) qmax: i32,
}

impl Integers {
    pub(crate) fn new(scheme: Scheme, bits: u8) -> Self {
        let (qmin, qmax) = scheme.integer_range(bits);
        Self { scheme, qmin, qmax }
    }

    /// Smallest and largest multiple of the scale that `zero_point` leaves: `q - zero_point`.
    pub(crate) fn levels(self, zero_point: i32) -> (f32, f32) {
        ((self.qmin - zero_point) as f32, (self.qmax - zero_point) as f32)
    }

    /// The grid that just covers `lo..=hi`, which is widened to include 0.
    pub(crate) fn covering(self, lo: f64, hi: f64) -> Entry {
        let (lo, hi) = (lo.min(0.0), hi.max(0.0));
        if lo == 0.0 && hi == 0.0 {
            return Entry { scale: 1.0, zero_point: 0 };
        }
        if self.scheme.is_symmetric() {
            return Entry { scale: usable(hi.max(-lo) / f64::from(self.qmax)), zero_point: 0 };
        }
        let scale = usable((hi - lo) / f64::from(self.qmax - self.qmin));
        let zero_point = (-lo / f64::from(scale)).round_ties_even() as i32 + self.qmin;
        Entry { scale, zero_point: zero_point.clamp(self.qmin, self.qmax) }
    }
}

/// The nearest f32 that may serve as a scale.
pub(crate) fn usable(scale: f64) -> f32 {
    (scale as f32).clamp(SCALE_MIN, f32::MAX)
}

/// The weights of one grid: lines of `width` columns which share `importance` (`[width]`, largest value at most 1).
#[derive(Clone, Copy)]
pub(crate) struct Cell<'a> {
    pub(crate) w: &'a [f32],
    pub(crate) width: usize,
    pub(crate) importance: Option<&'a [f32]>,
}

/// Chooses the encodings of `w` (`[rows, cols]` row-major) for `spec`.
///
/// `importance` (`[cols]`, non-negative, for instance the Gram diagonal) weights columns in the MSE search:
/// `sum importance[c] * (w - w_q)^2`; the other estimators only check it. A grid whose columns all have importance 0
/// is searched unweighted. One thread; the result depends on nothing but the arguments.
///
/// # Errors
/// What [`GridSpec::validate`] finds; `Empty`, `TooLarge`, `Length` for shapes; `NonFinite` with the first bad weight;
/// `Importance` with the first bad column.
pub fn estimate(
    spec: &GridSpec,
    w: &[f32],
    rows: usize,
    cols: usize,
    importance: Option<&[f32]>,
) -> Result<Encodings, QuantError> {
    spec.validate()?;
    check_weights(w, rows, cols)?;
    let importance = importance.map(|values| normalised(values, cols)).transpose()?;
    let mut estimator = Estimator::new(spec);
    let mut encodings = Encodings {
        bits: spec.bits,
        scheme: spec.scheme,
        granularity: spec.granularity,
        rows,
        cols,
        scale: Vec::new(),
        zero_point: Vec::new(),
    };
    for_each_cell(spec.granularity, w, cols, importance.as_deref(), |cell| {
        let entry = estimator.entry(cell);
        encodings.scale.push(entry.scale);
        encodings.zero_point.push(entry.zero_point);
    });
    Ok(encodings)
}

/// An estimator with the buffers it reuses from grid to grid.
struct Estimator {
    integers: Integers,
    range: RangeEstimator,
    sorted: Vec<f32>,
    histogram: Histogram,
}

impl Estimator {
    fn new(spec: &GridSpec) -> Self {
        let integers = Integers::new(spec.scheme, spec.bits);
        Self { integers, range: spec.range, sorted: Vec::new(), histogram: Histogram::default() }
    }

    fn entry(&mut self, cell: Cell<'_>) -> Entry {
        let (lo, hi) = min_max(cell.w);
        if lo == 0.0 && hi == 0.0 {
            return self.integers.covering(0.0, 0.0);
        }
        match self.range {
            RangeEstimator::MinMax => self.integers.covering(lo.into(), hi.into()),
            RangeEstimator::Mse => mse_search::search(self.integers, cell, lo, hi),
            RangeEstimator::Percentile { percentile } => self.percentile(cell.w, percentile, lo, hi),
            RangeEstimator::Enhanced => enhanced::search(self.integers, &mut self.histogram, cell.w, lo, hi),
        }
    }

    /// Clips to the percentile of `|w|` (symmetric) or to the percentiles of both ends. A range that collapses to 0
    /// (a sparse row) is replaced by the full one.
    fn percentile(&mut self, w: &[f32], percentile: f32, lo: f32, hi: f32) -> Entry {
        self.sorted.clear();
        let upper = f64::from(percentile) / 100.0;
        let (low, high) = if self.integers.scheme.is_symmetric() {
            self.sorted.extend(w.iter().map(|x| x.abs()));
            (0.0, quantile(&mut self.sorted, upper))
        } else {
            self.sorted.extend_from_slice(w);
            (quantile(&mut self.sorted, 1.0 - upper), quantile(&mut self.sorted, upper))
        };
        if low >= 0.0 && high <= 0.0 {
            return self.integers.covering(lo.into(), hi.into());
        }
        self.integers.covering(low, high)
    }
}

/// Quantile by linear interpolation between order statistics (NumPy's default). `values` is reordered, not empty.
fn quantile(values: &mut [f32], fraction: f64) -> f64 {
    let position = fraction.clamp(0.0, 1.0) * (values.len() - 1) as f64;
    let below = (position.floor() as usize).min(values.len() - 1);
    let (_, &mut low, above) = values.select_nth_unstable_by(below, f32::total_cmp);
    let high = above.iter().copied().min_by(f32::total_cmp).unwrap_or(low);
    f64::from(low) + (f64::from(high) - f64::from(low)) * position.fract()
}

fn min_max(w: &[f32]) -> (f32, f32) {
    w.iter()
        .fold((0.0_f32, 0.0_f32), |(lo, hi), &x| (if x < lo { x } else { lo }, if x > hi { x } else { hi }))
}

fn for_each_cell<'a>(
    granularity: Granularity,
    w: &'a [f32],
    cols: usize,
    importance: Option<&'a [f32]>,
    mut visit: impl FnMut(Cell<'a>),
) {
    // Columns nobody weighs cannot be told apart, so they are searched unweighted.
    let weighed = |range: std::ops::Range<usize>| {
        importance.map(|values| &values[range]).filter(|values| values.iter().any(|&v| v > 0.0))
    };
    match granularity {
        Granularity::PerTensor => visit(Cell { w, width: cols, importance: weighed(0..cols) }),
        Granularity::PerChannel => {
            let importance = weighed(0..cols);
            w.chunks(cols).for_each(|row| visit(Cell { w: row, width: cols, importance }));
        }
        Granularity::PerGroup { group_size } => {
            for row in w.chunks(cols) {
                for (group, run) in row.chunks(group_size).enumerate() {
                    let start = group * group_size;
                    visit(Cell { w: run, width: run.len(), importance: weighed(start..start + run.len()) });
                }
            }
        }
    }
}

pub(crate) fn check_weights(w: &[f32], rows: usize, cols: usize) -> Result<(), QuantError> {
    let expected = element_count(rows, cols)?;
    if expected == 0 {
        return Err(QuantError::Empty { rows, cols });
    }
    check_length("weight matrix", expected, w.len())?;
    match w.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(QuantError::NonFinite { row: at / cols, col: at % cols, value: w[at] }),
        None => Ok(()),
    }
}

/// Importance with its largest value scaled to 1, so that sums in f32 neither overflow nor vanish.
pub(crate) fn normalised(importance: &[f32], cols: usize) -> Result<Vec<f32>, QuantError> {
    check_length("importance", cols, importance.len())?;
    if let Some(col) = importance.iter().position(|v| !(v.is_finite() && *v >= 0.0)) {
        return Err(QuantError::Importance { col, value: importance[col] });
    }
    let max = f64::from(importance.iter().copied().fold(0.0_f32, f32::max)).max(f64::MIN_POSITIVE);
    Ok(importance.iter().map(|&v| (f64::from(v) / max) as f32).collect())
}
