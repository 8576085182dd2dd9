//! Rows of a layer's sums on their way to means: what nodes hand to each other, in exact integers and in f32.
//!
//! A slice covers rows of the matrices of all groups, one after the other. H and G are symmetric and travel as their
//! lower triangle, row by row, so any row range of them is contiguous; C travels whole. Integers of slices are added;
//! the conversion to f32 happens once per entry, after all additions, so who adds what cannot matter.
//! Not here: their bytes (`slice_wire`), whole matrices (`layer_means`), whose turn it is (`agent::collective`).

use crate::error::ExecError;
use crate::fixed_gram::{Part, power_of_two};
use crate::statistics::Exponents;
use std::ops::Range;

/// Some rows of the sums of one use of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UseSlice {
    /// Rows summed over all shards, by agreement.
    pub positions: u64,
    /// Of the integers.
    pub exponents: Exponents,
    /// The rows of H; then, where streams differ, of C and of G.
    pub sums: Vec<i64>,
}

/// Some rows of the sums of all uses of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SumSlice {
    /// Width of the matrices.
    pub cols: usize,
    /// Rows of all groups' matrices.
    pub rows: Range<usize>,
    /// In the layer's order.
    pub uses: Vec<UseSlice>,
}

/// Some rows of a layer's means over all shards and uses.
#[derive(Debug, Clone, PartialEq)]
pub struct MeanSlice {
    /// Width of the matrices.
    pub cols: usize,
    /// Rows of all groups' matrices.
    pub rows: Range<usize>,
    /// Positions of all uses.
    pub positions: u64,
    /// Whether C and G follow H.
    pub differs: bool,
    /// The rows of H; then, where streams differ, of C and of G.
    pub means: Vec<f32>,
}

/// The matrices of a slice, in order, with what is kept of them.
pub(crate) fn parts(differs: bool) -> &'static [Part] {
    if differs { &[Part::Lower, Part::Full, Part::Lower] } else { &[Part::Lower] }
}

/// How many numbers a slice has.
pub(crate) fn entries(rows: &Range<usize>, cols: usize, differs: bool) -> usize {
    parts(differs).iter().map(|part| part.entries_of(rows.clone(), cols)).sum()
}

impl SumSlice {
    /// Adds the sums of other shards; exact, in any order.
    ///
    /// # Errors
    /// `Internal` if the two are not of one form: then nothing is added.
    pub fn add(&mut self, other: &Self) -> Result<(), ExecError> {
        let form = |slice: &Self| {
            let uses = slice.uses.iter().map(|one| (one.positions, one.exponents, one.sums.len()));
            (slice.cols, slice.rows.clone(), uses.collect::<Vec<_>>())
        };
        if form(self) != form(other) {
            return Err(ExecError::Internal(format!(
                "slices of sums differ in form: {:?} and {:?}",
                form(self),
                form(other)
            )));
        }
        for (mine, theirs) in self.uses.iter_mut().zip(&other.uses) {
            for (sum, value) in mine.sums.iter_mut().zip(&theirs.sums) {
                *sum = sum.wrapping_add(*value);
            }
        }
        Ok(())
    }

    /// Sums divided by positions, in f32. Uses are added in their order, in f64: the integers of different uses may
    /// have different exponents.
    ///
    /// # Errors
    /// `Internal` if the uses are not of one form.
    pub fn means(&self) -> Result<MeanSlice, ExecError> {
        let differs = self.uses.iter().any(|one| one.exponents.cross.is_some());
        let len = entries(&self.rows, self.cols, differs);
        let of_form = |one: &UseSlice| one.exponents.cross.is_some() == differs && one.sums.len() == len;
        if !self.uses.iter().all(of_form) {
            return Err(ExecError::Internal("uses of one layer have sums of different forms".into()));
        }
        // Foreign counts: whatever they are, their sum is a number.
        let positions = self.uses.iter().fold(0, |sum: u64, one| sum.saturating_add(one.positions));
        let total = positions.max(1) as f64;
        let mut means = Vec::with_capacity(len);
        match self.uses.as_slice() {
            // Nothing to add: no matrix of f64.
            [one] => self.scaled(one, &mut |value| means.push((value / total) as f32)),
            uses => {
                let mut sums = vec![0.0f64; len];
                for one in uses {
                    let mut rest = sums.iter_mut();
                    self.scaled(one, &mut |value| rest.next().into_iter().for_each(|sum| *sum += value));
                }
                means.extend(sums.iter().map(|sum| (sum / total) as f32));
            }
        }
        Ok(MeanSlice { cols: self.cols, rows: self.rows.clone(), positions, differs, means })
    }

    /// Gives `take` the sums of a use of this slice's form, as the numbers they are.
    fn scaled(&self, one: &UseSlice, take: &mut impl FnMut(f64)) {
        let Exponents { h, cross } = one.exponents;
        let exponents = [Some(h), cross.map(|c| c.0), cross.map(|c| c.1)];
        let mut start = 0;
        for (part, exponent) in parts(cross.is_some()).iter().zip(exponents.into_iter().flatten()) {
            let end = start + part.entries_of(self.rows.clone(), self.cols);
            let factor = power_of_two(-exponent);
            one.sums[start..end].iter().for_each(|value| take(*value as f64 * factor));
            start = end;
        }
    }
}
