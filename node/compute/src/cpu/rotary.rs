//! Rotary positions: pairs of numbers turned by an angle that grows with the position.
//!
//! Angles are products in f32, as reference implementations have them; their sine and cosine are computed in f64 and
//! rounded. Not here: frequencies (`exec`).

/// Sine and cosine of positions `0..`, for one set of frequencies.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RotaryTable {
    /// Pairs that turn: half the rotated width.
    pairs: usize,
    /// Position after position, `pairs` numbers each.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryTable {
    /// For positions `0..positions`; sine and cosine are multiplied by `factor`.
    pub fn new(frequencies: &[f32], factor: f32, positions: usize) -> Self {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        cos.reserve_exact(positions.saturating_mul(frequencies.len()));
        sin.reserve_exact(positions.saturating_mul(frequencies.len()));
        for position in 0..positions {
            for frequency in frequencies {
                let angle = f64::from(position as f32 * frequency);
                cos.push(angle.cos() as f32 * factor);
                sin.push(angle.sin() as f32 * factor);
            }
        }
        Self { pairs: frequencies.len(), cos, sin }
    }

    /// Positions it holds.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.pairs).unwrap_or(usize::MAX)
    }

    /// Pairs of a position; cosines and sines, position after position.
    pub(crate) fn parts(&self) -> (usize, &[f32], &[f32]) {
        (self.pairs, &self.cos, &self.sin)
    }

    /// Copies one head to `out`, its first `2 * pairs` entries turned. Entry `i` turns with entry `i + pairs`.
    ///
    /// # Panics
    /// If the lengths differ or are less than `2 * pairs`, or the table ends before `position`.
    pub fn turn(&self, position: usize, head: &[f32], out: &mut [f32]) {
        let pairs = self.pairs;
        assert!(
            head.len() == out.len() && head.len() >= 2 * pairs,
            "rotary: heads of {} and {}, expected at least {}",
            head.len(),
            out.len(),
            2 * pairs
        );
        let cos = &self.cos[position * pairs..][..pairs];
        let sin = &self.sin[position * pairs..][..pairs];
        let (first, rest) = head.split_at(pairs);
        let (second, still) = rest.split_at(pairs);
        let (out_first, rest) = out.split_at_mut(pairs);
        let (out_second, out_still) = rest.split_at_mut(pairs);
        for i in 0..pairs {
            out_first[i] = first[i] * cos[i] - second[i] * sin[i];
            out_second[i] = second[i] * cos[i] + first[i] * sin[i];
        }
        out_still.copy_from_slice(still);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_turn_by_position_times_frequency_and_the_rest_stays() {
        let frequencies = [1.0, 0.25, 0.01];
        let table = RotaryTable::new(&frequencies, 1.5, 50);
        assert_eq!(table.positions(), 50);
        let head: Vec<f32> = (0..8).map(|i| i as f32 - 3.0).collect();
        for position in [0, 1, 7, 49] {
            let mut out = [f32::NAN; 8];
            table.turn(position, &head, &mut out);
            for (i, frequency) in frequencies.iter().enumerate() {
                let (sin, cos) = (position as f64 * f64::from(*frequency)).sin_cos();
                let (a, b) = (f64::from(head[i]), f64::from(head[i + 3]));
                let want = [(a * cos - b * sin) * 1.5, (b * cos + a * sin) * 1.5];
                for (got, want) in [out[i], out[i + 3]].into_iter().zip(want) {
                    // The angle itself is rounded to f32: 49 radians to 2e-6.
                    assert!((f64::from(got) - want).abs() < 1e-5, "{position} {i}: {got}, expected {want}");
                }
            }
            assert_eq!(out[6..], head[6..]);
        }
    }

    #[test]
    fn without_frequencies_nothing_turns() {
        let table = RotaryTable::new(&[], 1.0, 3);
        let mut out = [0.0; 3];
        table.turn(9, &[1.0, 2.0, 3.0], &mut out);
        assert_eq!(out, [1.0, 2.0, 3.0]);
    }
}
