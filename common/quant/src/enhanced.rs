//! AIMET's "enhanced" range (`tf_enhanced`): from a 512-bin histogram, the grid with the smallest sum of rounding
//! error and three times the clipping error.
//!
//! The candidates are AIMET's: symmetric 101 scales (0.01 to 1.01 of min-max), asymmetric 17 scales x 21 offsets. The
//! ends of the range are, as there, the left edges of the outermost filled bins.
//! Deviation: AIMET widens ranges below 0.01 to 0.01, which breaks layers with small weights; here only a constant
//! grid is special (it takes min-max). Sums are f64.
//! Not here: activations, whose histograms would have to be merged.

use crate::range::{Entry, Integers, usable};

const BINS: usize = 512;
/// Weight of the clipping error.
const CLIPPING: f64 = 3.0;
const SCALES_SYMMETRIC: u32 = 101;
const SCALES_ASYMMETRIC: u32 = 17;
const OFFSETS: i32 = 21;

/// Shares of the weights by bin, and the bins' centres.
pub(crate) struct Histogram {
    share: [f64; BINS],
    centre: [f64; BINS],
}

impl Default for Histogram {
    fn default() -> Self {
        Self { share: [0.0; BINS], centre: [0.0; BINS] }
    }
}

impl Histogram {
    /// Fills the histogram over `lo..=hi` and returns the left edges of the first and the last bin. Needs `lo < hi`.
    fn fill(&mut self, w: &[f32], lo: f64, hi: f64) -> (f64, f64) {
        let width = (hi - lo) / BINS as f64;
        self.share.fill(0.0);
        let each = 1.0 / w.len() as f64;
        for &x in w {
            // The cast saturates at 0; the largest weight belongs to the last bin.
            let bin = ((f64::from(x) - lo) / width) as usize;
            self.share[bin.min(BINS - 1)] += each;
        }
        for (bin, centre) in self.centre.iter_mut().enumerate() {
            *centre = lo + (bin as f64 + 0.5) * width;
        }
        // Both outermost bins are filled, since lo and hi are weights.
        (lo, lo + (BINS - 1) as f64 * width)
    }

    /// Rounding error plus CLIPPING times clipping error of a grid of levels `lo..=hi` (multiples of `scale`).
    fn cost(&self, scale: f64, lo: f64, hi: f64) -> f64 {
        let reciprocal = scale.recip();
        let mut lanes = [0.0_f64; 8];
        for (share, centre) in self.share.chunks_exact(8).zip(self.centre.chunks_exact(8)) {
            for lane in 0..8 {
                let t = centre[lane] * reciprocal;
                let clipped = if t > lo { t } else { lo };
                let clipped = if clipped < hi { clipped } else { hi };
                let factor = if clipped == t { 1.0 } else { CLIPPING };
                let error = round(clipped) - t;
                lanes[lane] += share[lane] * factor * error * error;
            }
        }
        lanes.iter().sum::<f64>() * scale * scale
    }
}

/// Rounds half to even for |t| <= 2^51, without a library call.
fn round(t: f64) -> f64 {
    const ROUND: f64 = 6_755_399_441_055_744.0;
    (t + ROUND) - ROUND
}

/// Searches the grid of weights `w`, whose range widened by 0 is `lo..=hi`.
pub(crate) fn search(integers: Integers, histogram: &mut Histogram, w: &[f32], lo: f32, hi: f32) -> Entry {
    let least = w.iter().copied().fold(f32::INFINITY, f32::min);
    let most = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let fallback = integers.covering(lo.into(), hi.into());
    if least == most {
        return fallback;
    }
    let (first, last) = histogram.fill(w, least.into(), most.into());
    let (first, last) = (first.min(0.0), last.max(0.0));
    if integers.scheme.is_symmetric() {
        symmetric(integers, histogram, first, last)
    } else {
        asymmetric(integers, histogram, first, last).unwrap_or(fallback)
    }
}

fn symmetric(integers: Integers, histogram: &Histogram, lo: f64, hi: f64) -> Entry {
    let (first, last) = integers.levels(0);
    let largest = hi.max(-lo) / f64::from(integers.qmax);
    let scales = (1..=SCALES_SYMMETRIC).map(|f| f64::from(usable(f64::from(f) / 100.0 * largest)));
    let scale = least_cost(scales, |&s| histogram.cost(s, first.into(), last.into())).unwrap_or(largest);
    Entry { scale: usable(scale), zero_point: 0 }
}

fn asymmetric(integers: Integers, histogram: &Histogram, lo: f64, hi: f64) -> Option<Entry> {
    let steps = f64::from(integers.qmax - integers.qmin);
    let widest = (hi - lo) / steps;
    let observed = (lo / widest).round();
    let (lo, hi) = (widest * observed, widest * (observed + steps));
    let count = OFFSETS.min(integers.qmax - integers.qmin + 2);
    let spacing = steps / f64::from(count - 2);
    let offsets = (0..count - 1).map(|i| (f64::from(i) * spacing - steps).round()).chain([observed]);
    let candidates =
        offsets.flat_map(|offset| (1..=SCALES_ASYMMETRIC).map(move |f| (f64::from(f) / 16.0, offset)));
    let candidates = candidates.filter_map(|(f, offset)| {
        let start = widest * f * offset;
        let (start, end) = (start.max(lo), (start + widest * f * steps).min(hi));
        let scale = (end - start) / steps;
        (scale > 0.0).then(|| (f64::from(usable(scale)), (start / scale).round()))
    });
    let (scale, offset) =
        least_cost(candidates, |&(scale, offset)| histogram.cost(scale, offset, offset + steps))?;
    Some(Entry { scale: usable(scale), zero_point: (-offset) as i32 + integers.qmin })
}

/// The first candidate of least cost.
fn least_cost<T>(candidates: impl Iterator<Item = T>, cost: impl Fn(&T) -> f64) -> Option<T> {
    let mut best: Option<(f64, T)> = None;
    for candidate in candidates {
        let cost = cost(&candidate);
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}
