//! One row chunk as a problem, and its solution.
//!
//! Not here: how the chunk was cut, how the statistics were gathered.

use halfstep_quant::Encodings;

use crate::SolveError;

/// The element-wise function that directly follows the layer.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Activation {
    /// None.
    #[default]
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, min), max)`.
    Clip {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
    /// `x` if positive, else `slope * x`.
    LeakyRelu {
        /// Slope for negative inputs.
        slope: f32,
    },
    /// As `LeakyRelu`, one slope for all rows or one per row of the chunk.
    PRelu {
        /// Slopes: 1 or `rows` of the chunk.
        slope: Vec<f32>,
    },
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `tanh(x)`.
    Tanh,
    /// `x * clamp(x / 6 + 0.5, 0, 1)`.
    HardSwish,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)`.
    Gelu,
    /// GELU by the tanh approximation.
    GeluTanh,
}

impl Activation {
    /// The device's activations: one, or one per row.
    pub(crate) fn per_row(&self, rows: usize) -> Result<Vec<halfstep_compute::Activation>, SolveError> {
        use halfstep_compute::Activation as Device;
        let one = match *self {
            Self::Identity => Device::Identity,
            Self::Relu => Device::Relu,
            Self::Clip { min, max } => Device::Clip { min, max },
            Self::LeakyRelu { slope } => Device::LeakyRelu { slope },
            Self::PRelu { ref slope } if slope.len() == 1 || slope.len() == rows => {
                return Ok(slope.iter().map(|slope| Device::PRelu { slope: *slope }).collect());
            }
            Self::PRelu { ref slope } => {
                return Err(SolveError::Length {
                    what: "slopes of PRelu",
                    expected: rows,
                    actual: slope.len(),
                });
            }
            Self::Sigmoid => Device::Sigmoid,
            Self::Tanh => Device::Tanh,
            Self::HardSwish => Device::HardSwish,
            Self::Silu => Device::Silu,
            Self::Gelu => Device::Gelu,
            Self::GeluTanh => Device::GeluTanh,
        };
        Ok(vec![one])
    }
}

/// Second moments of a layer's input, means over positions; `x` full precision, `x~` quantized stream.
#[derive(Debug, Clone, Copy)]
pub struct GramView<'a> {
    /// `E[x~ x~^T]`, `[cols, cols]`, symmetric.
    pub h: &'a [f32],
    /// `E[x x~^T]`, `[cols, cols]`: entry `[i, j]` is the mean of `x_i x~_j`.
    pub c: &'a [f32],
    /// `E[x x^T]`, `[cols, cols]`; `None`: taken to be `h` (exact in independent propagation). Only the reported
    /// objectives and signal depend on it, never the rounding.
    pub g_energy: Option<&'a [f32]>,
    /// Positions behind the means.
    pub count: f64,
}

/// Calibration positions themselves.
#[derive(Debug, Clone, Copy)]
pub struct SamplesView<'a> {
    /// Inputs in the quantized stream, `[n, cols]`.
    pub x_q: &'a [f32],
    /// Inputs in the full-precision stream, `[n, cols]`.
    pub x_fp: &'a [f32],
    /// Positions.
    pub n: usize,
}

/// What is known about the layer's input.
#[derive(Debug, Clone, Copy)]
pub enum Statistics<'a> {
    /// Second moments: the gram objective.
    Gram(GramView<'a>),
    /// Positions: the samples objective.
    Samples(SamplesView<'a>),
}

/// Rows of one layer (all in one convolution group) to be rounded.
#[derive(Debug, Clone)]
pub struct RowProblem<'a> {
    /// Weights, `[rows, cols]`.
    pub w: &'a [f32],
    /// Output channels in this chunk.
    pub rows: usize,
    /// Inputs per group times kernel positions.
    pub cols: usize,
    /// Encodings of just these rows.
    pub encodings: &'a Encodings,
    /// Bias, `[rows]`; only the samples objective with an activation depends on it.
    pub bias: Option<&'a [f32]>,
    /// Alpha: the layer computes `alpha * W x + bias`.
    pub output_scale: f32,
    /// What follows; anything but identity needs [`Statistics::Samples`].
    pub activation: Activation,
    /// The layer's input.
    pub statistics: Statistics<'a>,
    /// Names the layer in the randomness.
    pub layer_key: u64,
    /// First row of the chunk in the layer; used in messages only.
    pub first_row: usize,
}

/// How a chunk came out. Objectives are sums over the chunk's rows of the mean (over positions) squared output error.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ChunkReport {
    /// Of nearest rounding.
    pub objective_nearest: f64,
    /// Of the result; never larger.
    pub objective: f64,
    /// Energy of the full-precision output (before bias; after the activation and bias for the samples objective).
    pub signal: f64,
    /// Weights that are not at their nearest integer.
    pub rounded_away: usize,
    /// Rows where the solver's result was worse than nearest or the start, and was replaced.
    pub guarded_rows: usize,
    /// Columns whose input is always 0 (`H_jj == 0`): rounded to nearest.
    pub dead_inputs: usize,
    /// Rows whose weights are all 0: every integer is the zero point.
    pub zero_rows: usize,
    /// AdaRound iterations that were run.
    pub iterations: u32,
    /// Coordinate-descent sweeps that were run, all starts together.
    pub refine_sweeps: u32,
}

/// A solved chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    /// Grid integers, `[rows, cols]`; each floor or ceil of `w / scale + zero_point`, clipped.
    pub q: Vec<i32>,
    /// How it came out.
    pub report: ChunkReport,
}
