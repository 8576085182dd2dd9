//! The two neighbours of every weight on its grid, in error form: how far each lies from the weight.
//!
//! Everything after this works on errors `e = w~ - w` of about half a step instead of on weights: f32 then keeps its digits
//! for what rounding decides. Not here: choosing grids (`quant`), which neighbour to take.

use std::ops::Range;

use halfstep_quant::Encodings;

/// Neighbours of a chunk's weights; all arrays `[rows, cols]`.
///
/// A weight outside the grid has one neighbour; so have, by rule, the weights of dead inputs (their nearest) and of rows
/// that are all 0 (the zero point). Their `delta` is 0.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cells {
    /// `(floor_q - zero_point) * scale - w`.
    pub(crate) low: Vec<f32>,
    /// Scale; 0 where the weight is fixed.
    pub(crate) delta: Vec<f32>,
    /// The lower integer.
    pub(crate) floor_q: Vec<i32>,
    /// 1.0 where nearest rounding takes the upper neighbour.
    pub(crate) nearest_up: Vec<f32>,
    /// Rows whose weights are all 0.
    pub(crate) zero_rows: usize,
}

impl Cells {
    /// The neighbours of `w` (finite, `[rows, cols]`) under valid encodings; `dead[cols]`: inputs that are always 0.
    pub(crate) fn new(w: &[f32], encodings: &Encodings, dead: &[bool]) -> Self {
        let mut cells = Self::default();
        cells.renew(w, encodings, dead);
        cells
    }

    /// The same in the place of those of another grid.
    pub(crate) fn renew(&mut self, w: &[f32], encodings: &Encodings, dead: &[bool]) {
        let (cols, count) = (encodings.cols, w.len());
        for values in [&mut self.low, &mut self.delta, &mut self.nearest_up] {
            values.resize(count, 0.0);
        }
        // What becomes the lower integers begins as the nearest.
        self.floor_q = encodings.quantize_nearest(w);
        self.zero_rows = 0;
        for (row, weights) in w.chunks_exact(cols).enumerate() {
            let zero = weights.iter().all(|w| *w == 0.0);
            self.zero_rows += usize::from(zero);
            for start in (0..cols).step_by(encodings.group_cols().max(1)) {
                let group = start..cols.min(start + encodings.group_cols().max(1));
                let (scale, zero_point) =
                    (encodings.scale_at(row, start), encodings.zero_point_at(row, start));
                let limits = [encodings.qmin() - zero_point, encodings.qmax() - zero_point];
                let at = row * cols + group.start..row * cols + group.end;
                let fixed = dead[group.clone()].iter().map(|dead| *dead || zero);
                self.place(&weights[group], fixed, at, scale, zero_point, limits);
            }
        }
    }

    /// The neighbours of the weights `at`, all of one scale; `limits`: the lowest level and the highest.
    fn place(
        &mut self,
        w: &[f32],
        fixed: impl Iterator<Item = bool>,
        at: Range<usize>,
        scale: f32,
        zero_point: i32,
        [lowest, highest]: [i32; 2],
    ) {
        let (low, delta) = (&mut self.low[at.clone()], &mut self.delta[at.clone()]);
        let (floor_q, nearest_up) = (&mut self.floor_q[at.clone()], &mut self.nearest_up[at]);
        let out = low.iter_mut().zip(delta).zip(floor_q.iter_mut().zip(nearest_up));
        for ((w, fixed), ((low, delta), (q, up))) in w.iter().zip(fixed).zip(out) {
            let level = floor(w / scale);
            let free = level >= lowest && level < highest && !fixed;
            let level = if free { level } else { *q - zero_point };
            *low = level as f32 * scale - w;
            *delta = if free { scale } else { 0.0 };
            *up = if *q - zero_point > level { 1.0 } else { 0.0 };
            *q = level + zero_point;
        }
    }

    /// Where each weight lies between its neighbours, in [0, 1]; 0 where it is fixed.
    pub(crate) fn fraction(&self, index: usize) -> f32 {
        if self.delta[index] == 0.0 { 0.0 } else { (-self.low[index] / self.delta[index]).clamp(0.0, 1.0) }
    }

    /// The error of weight `index` at `up` (0.0 or 1.0).
    pub(crate) fn error(&self, index: usize, up: f32) -> f32 {
        up * self.delta[index] + self.low[index]
    }

    /// The choices nearest to given integers: 1.0 for the upper neighbour.
    pub(crate) fn choices(&self, q: &[i32]) -> Vec<f32> {
        let choice =
            |((floor, q), delta): ((&i32, &i32), &f32)| f32::from(u8::from(q > floor && *delta != 0.0));
        self.floor_q.iter().zip(q).zip(&self.delta).map(choice).collect()
    }

    /// The integers of a rounding.
    pub(crate) fn integers(&self, up: &[f32]) -> Vec<i32> {
        self.floor_q.iter().zip(up).map(|(floor, up)| floor + i32::from(*up > 0.5)).collect()
    }
}

/// `x.floor()`, or an integer on the same side of every grid if it is none of 32 bits. The library's takes a call.
fn floor(x: f32) -> i32 {
    let towards_zero = x as i32;
    towards_zero.saturating_sub(i32::from(towards_zero as f32 > x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_quant::{Granularity, Scheme};

    fn encodings(bits: u8, scheme: Scheme, cols: usize, scale: f32, zero_point: i32) -> Encodings {
        let granularity = Granularity::PerTensor;
        Encodings {
            bits,
            scheme,
            granularity,
            rows: 1,
            cols,
            scale: vec![scale],
            zero_point: vec![zero_point],
        }
    }

    #[test]
    fn neighbours_are_floor_and_ceil_and_one_of_them_is_nearest() {
        let w = [0.26, -0.26, 0.74, 0.5, -1.1, 9.0, -9.0, 1.75];
        let encodings = encodings(4, Scheme::Symmetric, w.len(), 0.25, 0);
        let cells = Cells::new(&w, &encodings, &[false; 8]);
        assert_eq!(cells.floor_q, [1, -2, 2, 2, -5, 7, -8, 7]);
        assert_eq!(cells.delta, [0.25, 0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0]);
        assert_eq!(cells.integers(&cells.nearest_up), encodings.quantize_nearest(&w));
    }

    #[test]
    fn floors_are_the_librarys_and_far_numbers_keep_their_side() {
        let mut x = -3.0f32;
        while x < 3.0 {
            assert_eq!(floor(x), x.floor() as i32, "{x}");
            x += 0.01;
        }
        for whole in [-65536.0f32, -8388608.0, -1.0, -0.0, 0.0, 1.0, 65535.0, 16777216.0, 33554432.0] {
            for x in [whole, whole.next_down(), whole.next_up()] {
                assert_eq!(floor(x), x.floor() as i32, "{x}");
            }
        }
        assert_eq!([-3e9, -f32::MAX, f32::NEG_INFINITY].map(floor), [i32::MIN; 3]);
        assert_eq!([3e9, f32::MAX, f32::INFINITY].map(floor), [i32::MAX; 3]);
    }

    #[test]
    fn asymmetric_grid_clips_at_its_own_ends() {
        let w = [-0.6, -0.1, 0.3, 5.0];
        let encodings = encodings(2, Scheme::Asymmetric, w.len(), 0.5, 1);
        let cells = Cells::new(&w, &encodings, &[false; 4]);
        assert_eq!(cells.floor_q, [0, 0, 1, 3]);
        assert_eq!(cells.delta, [0.0, 0.5, 0.5, 0.0]);
        assert_eq!(cells.integers(&cells.nearest_up), encodings.quantize_nearest(&w));
    }

    #[test]
    fn dead_inputs_and_zero_rows_are_fixed_at_nearest() {
        let encodings = encodings(4, Scheme::Symmetric, 2, 0.25, 0);
        let cells = Cells::new(&[0.2, 0.3], &encodings, &[true, false]);
        assert_eq!((cells.floor_q[0], cells.delta[0], cells.delta[1]), (1, 0.0, 0.25));
        let cells = Cells::new(&[0.0, 0.0], &encodings, &[false, false]);
        assert_eq!(
            (cells.zero_rows, &cells.delta[..], &cells.floor_q[..]),
            (1, &[0.0, 0.0][..], &[0, 0][..])
        );
    }
}
