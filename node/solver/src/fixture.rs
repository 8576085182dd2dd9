//! Small random layers for tests, made from a seed; shared by unit and integration tests.
//!
//! Not here: expected results.

use halfstep_compute::random::Stream;
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme, estimate};

/// A layer with calibration positions of both streams and their second moments.
pub(crate) struct Fixture {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) n: usize,
    pub(crate) w: Vec<f32>,
    pub(crate) encodings: Encodings,
    pub(crate) x_fp: Vec<f32>,
    pub(crate) x_q: Vec<f32>,
    pub(crate) h: Vec<f32>,
    pub(crate) c: Vec<f32>,
    pub(crate) g: Vec<f32>,
}

impl Fixture {
    /// Correlated inputs (half common factor, half own), small errors in the quantized stream.
    pub(crate) fn new(seed: u64, rows: usize, cols: usize, n: usize, spec: GridSpec) -> Self {
        let mut stream = Stream::new(seed, 77, 0);
        let w: Vec<f32> = (0..rows * cols).map(|_| stream.normal_f32()).collect();
        let mut x_fp = Vec::with_capacity(n * cols);
        for _ in 0..n {
            let common = stream.normal_f32();
            x_fp.extend((0..cols).map(|_| 0.3 + common + 0.6 * stream.normal_f32()));
        }
        let x_q: Vec<f32> = x_fp.iter().map(|x| x + 0.1 * stream.normal_f32()).collect();
        let encodings = estimate(&spec, &w, rows, cols, None).expect("finite weights have a grid");
        let mut fixture = Self { rows, cols, n, w, encodings, x_fp, x_q, h: vec![], c: vec![], g: vec![] };
        fixture.measure();
        fixture
    }

    /// Recomputes the moments from the positions.
    pub(crate) fn measure(&mut self) {
        self.h = mean_outer(&self.x_q, &self.x_q, self.n, self.cols);
        self.c = mean_outer(&self.x_fp, &self.x_q, self.n, self.cols);
        self.g = mean_outer(&self.x_fp, &self.x_fp, self.n, self.cols);
    }

    #[allow(dead_code, reason = "not every test that includes this file has an oracle")]
    /// The mean squared output error of one row by definition, f64, over the positions.
    pub(crate) fn objective(&self, row: usize, rounded: &[f32], f: impl Fn(f64) -> f64) -> f64 {
        let weights = &self.w[row * self.cols..][..self.cols];
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let positions = self.x_fp.chunks_exact(self.cols).zip(self.x_q.chunks_exact(self.cols));
        positions.map(|(x, x_q)| (f(dot(weights, x)) - f(dot(rounded, x_q))).powi(2)).sum::<f64>()
            / self.n as f64
    }
}

fn mean_outer(a: &[f32], b: &[f32], n: usize, cols: usize) -> Vec<f32> {
    let entry = |i: usize, j: usize| {
        let sum: f64 = (0..n).map(|s| f64::from(a[s * cols + i]) * f64::from(b[s * cols + j])).sum();
        (sum / n as f64) as f32
    };
    (0..cols * cols).map(|index| entry(index / cols, index % cols)).collect()
}

/// Symmetric, per channel, min-max.
pub(crate) fn spec(bits: u8) -> GridSpec {
    let (granularity, range) = (Granularity::PerChannel, RangeEstimator::MinMax);
    GridSpec { bits, scheme: Scheme::Symmetric, granularity, range }
}
