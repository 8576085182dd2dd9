//! The two neighbours of every weight on its grid, in error form: how far each lies from the weight.
//!
//! Everything after this works on errors `e = w~ - w` of about half a step instead of on weights: f32 then keeps its digits
//! for what rounding decides. Not here: choosing grids (`quant`), which neighbour to take.

use halfstep_quant::{Encodings, nearest_level};

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
        self.floor_q.resize(count, 0);
        self.zero_rows = 0;
        let (width, all) = (encodings.group_cols().max(1), vec![true; cols]);
        for (row, weights) in w.chunks_exact(cols).enumerate() {
            let zero = weights.iter().all(|w| *w == 0.0);
            self.zero_rows += usize::from(zero);
            let fixed = if zero { &all } else { dead };
            for start in (0..cols).step_by(width) {
                let group = start..cols.min(start + width);
                let (scale, zero_point) =
                    (encodings.scale_at(row, start), encodings.zero_point_at(row, start));
                let limits = [encodings.qmin() - zero_point, encodings.qmax() - zero_point];
                let at = row * cols + group.start..row * cols + group.end;
                let out = Places {
                    low: &mut self.low[at.clone()],
                    delta: &mut self.delta[at.clone()],
                    floor_q: &mut self.floor_q[at.clone()],
                    nearest_up: &mut self.nearest_up[at],
                };
                place(&weights[group.clone()], &fixed[group], scale, zero_point, limits, out);
            }
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
        let mut up = vec![0.0; q.len()];
        choose(&self.floor_q, q, &self.delta, &mut up);
        up
    }

    /// The integers of a rounding.
    pub(crate) fn integers(&self, up: &[f32]) -> Vec<i32> {
        self.floor_q.iter().zip(up).map(|(floor, up)| floor + i32::from(*up > 0.5)).collect()
    }
}

/// The neighbours of a few weights.
struct Places<'a> {
    low: &'a mut [f32],
    delta: &'a mut [f32],
    floor_q: &'a mut [i32],
    nearest_up: &'a mut [f32],
}

/// The neighbours of weights of one scale; `limits`: the lowest level and the highest. All slices have one length.
///
/// Without branches and calls, and compiled for several levels of vector instructions, which compute the same bits.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2", "x86_64+avx2"))]
fn place(w: &[f32], fixed: &[bool], scale: f32, zero_point: i32, limits: [i32; 2], out: Places<'_>) {
    let count = w.len();
    let fixed = &fixed[..count];
    let (low, delta) = (&mut out.low[..count], &mut out.delta[..count]);
    let (floor_q, nearest_up) = (&mut out.floor_q[..count], &mut out.nearest_up[..count]);
    let (lowest, highest) = (limits[0] as f32, limits[1] as f32);
    for i in 0..count {
        let t = w[i] / scale;
        let nearest = nearest_level(t, lowest, highest);
        // The floor, or a level beyond the grid on the same side of it.
        let near = nearest_level(t, lowest - 1.0, highest + 1.0);
        let floor = if near > t { near - 1.0 } else { near };
        let free = (floor >= lowest) & (floor < highest) & !fixed[i];
        let level = if free { floor } else { nearest };
        low[i] = level * scale - w[i];
        delta[i] = if free { scale } else { 0.0 };
        nearest_up[i] = if nearest > level { 1.0 } else { 0.0 };
        floor_q[i] = level as i32 + zero_point;
    }
}

/// See [`Cells::choices`].
#[multiversion::multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2", "x86_64+avx2"))]
fn choose(floor_q: &[i32], q: &[i32], delta: &[f32], up: &mut [f32]) {
    let count = up.len();
    let (floor_q, q, delta) = (&floor_q[..count], &q[..count], &delta[..count]);
    for i in 0..count {
        up[i] = if (q[i] > floor_q[i]) & (delta[i] != 0.0) { 1.0 } else { 0.0 };
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
    fn floors_are_the_librarys_and_far_numbers_keep_their_side() {
        let mut xs: Vec<f32> = (-300..300).map(|i| i as f32 * 0.01).collect();
        for whole in [-65536.0f32, -32768.0, -9.0, -8.0, -1.0, -0.0, 0.0, 1.0, 7.0, 8.0, 32767.0, 65535.0] {
            xs.extend([whole, whole.next_down(), whole.next_up()]);
        }
        xs.extend([-3e9, -f32::MAX, 3e9, f32::MAX, 8388608.0, -8388609.0, 33554432.0]);
        for bits in [4, 16] {
            let encodings = encodings(bits, Scheme::Symmetric, xs.len(), 1.0, 0);
            let (lowest, highest) = (encodings.qmin() as f32, encodings.qmax() as f32);
            let cells = Cells::new(&xs, &encodings, &vec![false; xs.len()]);
            for (i, x) in xs.iter().enumerate() {
                let inside = x.floor() >= lowest && x.floor() < highest;
                let want = if inside { x.floor() } else { x.round_ties_even().clamp(lowest, highest) };
                assert_eq!(cells.floor_q[i] as f32, want, "{x} of {bits} bits");
                assert_eq!(cells.delta[i], f32::from(u8::from(inside)), "{x} of {bits} bits");
                let nearest = x.round_ties_even().clamp(lowest, highest);
                assert_eq!(cells.nearest_up[i] == 1.0, nearest > want, "{x} of {bits} bits");
            }
            assert_eq!(cells.integers(&cells.nearest_up), encodings.quantize_nearest(&xs));
        }
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
