//! The two neighbours of every weight on its grid, in error form: how far each lies from the weight.
//!
//! Everything after this works on errors `e = w~ - w` of about half a step instead of on weights: f32 then keeps its digits
//! for what rounding decides. Not here: choosing grids (`quant`), which neighbour to take.

use halfstep_quant::Encodings;

/// Neighbours of a chunk's weights; all arrays `[rows, cols]`.
///
/// A weight outside the grid has one neighbour; so have, by rule, the weights of dead inputs (their nearest) and of rows
/// that are all 0 (the zero point). Their `delta` is 0.
#[derive(Debug, Clone)]
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
        let nearest = encodings.quantize_nearest(w);
        let count = w.len();
        let mut cells = Self {
            low: Vec::with_capacity(count),
            delta: Vec::with_capacity(count),
            floor_q: Vec::with_capacity(count),
            nearest_up: Vec::with_capacity(count),
            zero_rows: 0,
        };
        let lines = w.chunks_exact(encodings.cols).zip(nearest.chunks_exact(encodings.cols));
        for (row, (weights, nearest)) in lines.enumerate() {
            let zero = weights.iter().all(|w| *w == 0.0);
            cells.zero_rows += usize::from(zero);
            for (col, (&w, &nearest)) in weights.iter().zip(nearest).enumerate() {
                let scale = encodings.scale_at(row, col);
                let zero_point = encodings.zero_point_at(row, col);
                let below = f64::from((w / scale).floor()) + f64::from(zero_point);
                let inside = below >= f64::from(encodings.qmin()) && below < f64::from(encodings.qmax());
                if inside && !zero && !dead[col] {
                    cells.push(w, scale, zero_point, below as i32, scale, nearest);
                } else {
                    cells.push(w, scale, zero_point, nearest, 0.0, nearest);
                }
            }
        }
        cells
    }

    fn push(&mut self, w: f32, scale: f32, zero_point: i32, floor_q: i32, delta: f32, nearest: i32) {
        self.low.push((floor_q - zero_point) as f32 * scale - w);
        self.delta.push(delta);
        self.floor_q.push(floor_q);
        self.nearest_up.push(if nearest > floor_q { 1.0 } else { 0.0 });
    }

    /// Where each weight lies between its neighbours, in [0, 1]; 0 where it is fixed.
    pub(crate) fn fraction(&self, index: usize) -> f32 {
        if self.delta[index] == 0.0 { 0.0 } else { (-self.low[index] / self.delta[index]).clamp(0.0, 1.0) }
    }

    /// The error of weight `index` at `up` (0.0 or 1.0).
    pub(crate) fn error(&self, index: usize, up: f32) -> f32 {
        up.mul_add(self.delta[index], self.low[index])
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
