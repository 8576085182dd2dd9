//! Scales and zero points of one weight matrix, and the mapping between real numbers and integers.
//!
//! `real = (q - zero_point) * scale`; nearest rounding is half to even, as in ONNX QuantizeLinear and AIMET.
//! Not here: choosing scales ([`crate::estimate`]), learned rounding (`halfstep-solver`).

use crate::grid::{check_bits, check_granularity};
use crate::mse_search::ROUND;
use crate::{Granularity, QuantError, Scheme};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The encodings of one weight matrix `[rows, cols]`.
///
/// `scale` and `zero_point` have one entry per grid: 1 (per tensor), `rows` (per channel) or
/// `rows * groups_per_row` row-major (per group). The fields are public so that records and tests can build them;
/// the methods assume what [`Encodings::validate`] checks, so call that on anything that was not made here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Encodings {
    /// Bit width.
    pub bits: u8,
    /// Integers and zero point.
    pub scheme: Scheme,
    /// Sharing of the entries below.
    pub granularity: Granularity,
    /// Rows of the matrix (output channels).
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
    /// Real distance between neighbouring integers; positive and normal.
    pub scale: Vec<f32>,
    /// The integer that stands for real zero.
    pub zero_point: Vec<i32>,
}

impl Encodings {
    /// Smallest integer of the grid.
    pub fn qmin(&self) -> i32 {
        self.scheme.integer_range(self.bits).0
    }

    /// Largest integer of the grid.
    pub fn qmax(&self) -> i32 {
        self.scheme.integer_range(self.bits).1
    }

    /// Grid groups along the columns: 1 unless the granularity is per group.
    pub fn groups_per_row(&self) -> usize {
        self.cols.div_ceil(self.group_cols()).max(1)
    }

    /// Columns that share an entry within a row.
    pub fn group_cols(&self) -> usize {
        match self.granularity {
            Granularity::PerGroup { group_size } => group_size.max(1),
            _ => self.cols.max(1),
        }
    }

    /// Entry that holds for `(row, col)`.
    pub fn index(&self, row: usize, col: usize) -> usize {
        match self.granularity {
            Granularity::PerTensor => 0,
            Granularity::PerChannel => row,
            Granularity::PerGroup { .. } => row * self.groups_per_row() + col / self.group_cols(),
        }
    }

    /// Scale at `(row, col)`. Panics outside the matrix.
    pub fn scale_at(&self, row: usize, col: usize) -> f32 {
        self.scale[self.index(row, col)]
    }

    /// Zero point at `(row, col)`. Panics outside the matrix.
    pub fn zero_point_at(&self, row: usize, col: usize) -> i32 {
        self.zero_point[self.index(row, col)]
    }

    /// Checks the whole: bit width, entry count, scales positive and normal, zero points inside the grid.
    ///
    /// # Errors
    /// The first property that does not hold.
    pub fn validate(&self) -> Result<(), QuantError> {
        check_bits(self.bits)?;
        check_granularity(self.granularity)?;
        if self.rows == 0 || self.cols == 0 {
            return Err(QuantError::Empty { rows: self.rows, cols: self.cols });
        }
        element_count(self.rows, self.cols)?;
        let expected = self.entry_count(self.rows);
        for (what, actual) in [("scale", self.scale.len()), ("zero point", self.zero_point.len())] {
            if actual != expected {
                return Err(QuantError::Length { what, expected, actual });
            }
        }
        if let Some(index) = self.scale.iter().position(|s| !(s.is_normal() && *s > 0.0)) {
            return Err(QuantError::Scale { index, value: self.scale[index] });
        }
        let (min, max) = if self.scheme.is_symmetric() { (0, 0) } else { (self.qmin(), self.qmax()) };
        match self.zero_point.iter().position(|z| !(min..=max).contains(z)) {
            Some(index) => Err(QuantError::ZeroPoint { index, value: self.zero_point[index], min, max }),
            None => Ok(()),
        }
    }

    /// The encodings of rows `range` alone; a range beyond the matrix is cut off at its end. Per tensor stays one entry.
    pub fn slice_rows(&self, range: Range<usize>) -> Encodings {
        let end = range.end.min(self.rows);
        let start = range.start.min(end);
        let entries = match self.granularity {
            Granularity::PerTensor => 0..1,
            _ => start * self.groups_per_row()..end * self.groups_per_row(),
        };
        Encodings {
            rows: end - start,
            scale: self.scale[entries.clone()].to_vec(),
            zero_point: self.zero_point[entries].to_vec(),
            ..*self
        }
    }

    /// Puts row slices back together, in order.
    ///
    /// # Errors
    /// `Length` without parts, `Parts` if parts differ in bits, scheme, granularity, columns, or, per tensor, in the
    /// entry; whatever [`Encodings::validate`] finds in the result.
    pub fn concat_rows(parts: &[Encodings]) -> Result<Encodings, QuantError> {
        let Some(first) = parts.first() else {
            return Err(QuantError::Length { what: "list of encodings", expected: 1, actual: 0 });
        };
        let mut whole = first.clone();
        for (index, part) in parts.iter().enumerate().skip(1) {
            check_part(first, part, index)?;
            whole.rows = whole
                .rows
                .checked_add(part.rows)
                .ok_or(QuantError::TooLarge { rows: part.rows, cols: part.cols })?;
            if whole.granularity != Granularity::PerTensor {
                whole.scale.extend_from_slice(&part.scale);
                whole.zero_point.extend_from_slice(&part.zero_point);
            }
        }
        whole.validate()?;
        Ok(whole)
    }

    /// Nearest integers of `w` (`[rows, cols]`): `clip(round(w / scale) + zero_point)`, half to even.
    ///
    /// Weights must be finite (as [`crate::estimate`] checks); NaN would become the zero point. Weights beyond the
    /// last row are ignored, so the result is never longer than the matrix.
    pub fn quantize_nearest(&self, w: &[f32]) -> Vec<i32> {
        let (qmin, qmax) = (self.qmin(), self.qmax());
        let mut q = Vec::with_capacity(w.len());
        self.for_each_run(w, |run, scale, zero_point| {
            let (lo, hi) = ((qmin - zero_point) as f32, (qmax - zero_point) as f32);
            q.extend(run.iter().map(|&x| nearest_level(x / scale, lo, hi) + zero_point));
        });
        q
    }

    /// Real values of integers `q` (`[rows, cols]`).
    ///
    /// # Errors
    /// `Length` if `q` is not the whole matrix; `OutOfRange` with the first integer outside the grid.
    pub fn dequantize(&self, q: &[i32]) -> Result<Vec<f32>, QuantError> {
        check_length("integer matrix", element_count(self.rows, self.cols)?, q.len())?;
        let (min, max) = (self.qmin(), self.qmax());
        if let Some(index) = q.iter().position(|v| !(min..=max).contains(v)) {
            let value = i64::from(q[index]);
            return Err(QuantError::OutOfRange { index, value, min: min.into(), max: max.into() });
        }
        let mut real = Vec::with_capacity(q.len());
        self.for_each_run(q, |run, scale, zero_point| {
            real.extend(run.iter().map(|&v| (v - zero_point) as f32 * scale));
        });
        Ok(real)
    }

    /// Quantizes to nearest and back. Same rules as [`Encodings::quantize_nearest`].
    pub fn fake_quantize(&self, w: &[f32]) -> Vec<f32> {
        let q = self.quantize_nearest(w);
        let mut real = Vec::with_capacity(q.len());
        self.for_each_run(&q, |run, scale, zero_point| {
            real.extend(run.iter().map(|&v| (v - zero_point) as f32 * scale));
        });
        real
    }

    /// Calls `visit(run, scale, zero_point)` for every run of elements that share an entry, in row-major order.
    fn for_each_run<T>(&self, values: &[T], mut visit: impl FnMut(&[T], f32, i32)) {
        for (row, line) in values.chunks(self.cols.max(1)).take(self.rows).enumerate() {
            for (group, run) in line.chunks(self.group_cols()).enumerate() {
                let index = self.index(row, group * self.group_cols());
                visit(run, self.scale[index], self.zero_point[index]);
            }
        }
    }

    fn entry_count(&self, rows: usize) -> usize {
        match self.granularity {
            Granularity::PerTensor => 1,
            // At most rows * cols, whose product was checked.
            _ => rows * self.groups_per_row(),
        }
    }
}

/// `t` rounded half to even, within integers `lo..=hi` (of at most 2^22 in magnitude); 0 for NaN.
///
/// Clamped first, which gives the same: then rounding needs no call, and the loop no branch.
fn nearest_level(t: f32, lo: f32, hi: f32) -> i32 {
    ((t.clamp(lo, hi) + ROUND) - ROUND) as i32
}

/// `rows * cols`, or `TooLarge`.
pub(crate) fn element_count(rows: usize, cols: usize) -> Result<usize, QuantError> {
    rows.checked_mul(cols).ok_or(QuantError::TooLarge { rows, cols })
}

pub(crate) fn check_length(what: &'static str, expected: usize, actual: usize) -> Result<(), QuantError> {
    if expected == actual { Ok(()) } else { Err(QuantError::Length { what, expected, actual }) }
}

fn check_part(first: &Encodings, part: &Encodings, index: usize) -> Result<(), QuantError> {
    let per_tensor_entry = |e: &Encodings| match e.granularity {
        Granularity::PerTensor => format!("{:?}/{:?}", e.scale, e.zero_point),
        _ => String::new(),
    };
    let pairs = [
        ("bits", first.bits.to_string(), part.bits.to_string()),
        ("scheme", first.scheme.to_string(), part.scheme.to_string()),
        ("granularity", first.granularity.to_string(), part.granularity.to_string()),
        ("columns", first.cols.to_string(), part.cols.to_string()),
        ("scale/zero point", per_tensor_entry(first), per_tensor_entry(part)),
    ];
    match pairs.into_iter().find(|(_, a, b)| a != b) {
        Some((what, expected, actual)) => Err(QuantError::Parts { index, what, expected, actual }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_rounding_first_and_clamping_then() {
        for (lo, hi) in [(-8.0, 7.0), (0.0, 15.0), (-65536.0, 65535.0), (-3.0, 0.0), (-1.0, -1.0)] {
            let check = |t: f32| {
                let want = t.round_ties_even().clamp(lo, hi) as i32;
                assert_eq!(nearest_level(t, lo, hi), want, "{t} within {lo}..={hi}");
            };
            (-400..400).map(|i| i as f32 * 0.125).for_each(check);
            for whole in [-65536.5f32, -8.5, -0.5, -0.0, 0.0, 0.5, 1.5, 7.5, 65534.5, 65535.5, 1e30, -1e30] {
                [whole, whole.next_down(), whole.next_up()].into_iter().for_each(check);
            }
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().for_each(check);
        }
    }
}
