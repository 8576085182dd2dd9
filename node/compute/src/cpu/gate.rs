//! Gates: an activation of one half times the other.
//!
//! Row by row, so that a row stays in the cache between its passes. Not here: the activations (`activation`).

use crate::Activation;

/// Rows of numbers that may be parts of wider ones.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The numbers, from the first row's first.
    pub data: &'a [f32],
    /// Numbers from one row to the next.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// The first `width` numbers of a row.
    ///
    /// # Panics
    /// If the row is not there.
    pub fn row(self, row: usize, width: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..width]
    }
}

/// `out = f(gate) * up`; `out`: `[rows, width]`, `gate` and `up` wide at least that.
///
/// # Panics
/// If an operand does not hold `rows` rows of `width`.
pub fn gate(f: Activation, gate: Rows<'_>, up: Rows<'_>, width: usize, out: &mut [f32]) {
    assert!(width > 0 && out.len().is_multiple_of(width), "gate: {} outputs in rows of {width}", out.len());
    for (row, out) in out.chunks_exact_mut(width).enumerate() {
        out.copy_from_slice(gate.row(row, width));
        f.apply(out);
        for (out, up) in out.iter_mut().zip(up.row(row, width)) {
            *out *= up;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_of_two_tensors_and_of_halves_are_the_same() {
        for width in [1, 7, 16, 33] {
            let number = |i: usize| (i as f32 * 0.37).sin() * 4.0;
            let fused: Vec<f32> = (0..3 * 2 * width).map(number).collect();
            let (first, second): (Vec<_>, Vec<_>) =
                fused.chunks(2 * width).map(|row| (row[..width].to_vec(), row[width..].to_vec())).unzip();
            let (first, second) = (first.concat(), second.concat());
            let mut apart = vec![0.0; 3 * width];
            let rows = |data, stride| Rows { data, stride };
            gate(Activation::Silu, rows(&first, width), rows(&second, width), width, &mut apart);
            let mut halves = vec![0.0; 3 * width];
            gate(
                Activation::Silu,
                rows(&fused, 2 * width),
                rows(&fused[width..], 2 * width),
                width,
                &mut halves,
            );
            assert_eq!(apart, halves);
            for (i, got) in apart.iter().enumerate() {
                let (x, up) = (f64::from(first[i]), f64::from(second[i]));
                let want = x / (1.0 + (-x).exp()) * up;
                assert!((f64::from(*got) - want).abs() <= 4e-6, "{i}: {got}, expected {want}");
            }
        }
    }
}
