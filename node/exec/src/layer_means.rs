//! A layer's means while its slices come, and afterwards: whole matrices, filled in place, from which any slice can be read again.
//!
//! Nothing is held twice: a slice is copied to its rows and dropped, and whoever asks for one gets a copy. Rows that never come
//! take no memory, since their pages are never written. H and G come as lower triangles; their upper ones are filled once all is in.
//! Not here: where slices come from, who asks for them (`agent`).

use crate::error::ExecError;
use crate::slice::{MeanSlice, entries, parts};
use crate::statistics::GroupMeans;
use halfstep_compute::cpu;
use std::ops::Range;

/// See the module. Slices of one layer are of one form: that of the first.
#[derive(Debug, Default)]
pub struct LayerMeans {
    cols: usize,
    /// Positions of all uses, and whether C and G follow H; of the first slice.
    form: Option<(u64, bool)>,
    /// Whether a row is in, rows of all groups one after the other.
    there: Vec<bool>,
    complete: bool,
    groups: Vec<GroupMeans>,
}

impl LayerMeans {
    /// Nothing yet, of `groups` matrices `[cols, cols]` of each kind.
    pub fn new(cols: usize, groups: usize) -> Self {
        let there = vec![false; cols.saturating_mul(groups)];
        let groups = (0..groups).map(|_| GroupMeans::default()).collect();
        Self { cols, there, groups, ..Self::default() }
    }

    /// Whether all of these rows are in.
    pub fn has(&self, rows: &Range<usize>) -> bool {
        self.there.get(rows.clone()).is_some_and(|rows| rows.iter().all(|there| *there))
    }

    /// Copies a slice to its rows.
    ///
    /// # Errors
    /// `Internal` if it is not of the layer's form, or a row is in already: then nothing is copied.
    pub fn place(&mut self, slice: &MeanSlice) -> Result<(), ExecError> {
        let form = (slice.positions, slice.differs);
        let rows = self.there.get(slice.rows.clone());
        let fits = slice.cols == self.cols
            && self.form.is_none_or(|first| first == form)
            && rows.is_some_and(|rows| !rows.contains(&true))
            && slice.means.len() == entries(&slice.rows, slice.cols, slice.differs);
        if !fits {
            let problem = format!("slice of means {:?} does not fit the rows that are missing", slice.rows);
            return Err(ExecError::Internal(problem));
        }
        if self.form.is_none() {
            self.form = Some(form);
            self.begin(slice.differs);
        }
        self.copy(slice);
        self.there[slice.rows.clone()].fill(true);
        Ok(())
    }

    /// Zeros: memory that is not written is not there yet.
    fn begin(&mut self, differs: bool) {
        let empty = || vec![0.0; self.cols.saturating_mul(self.cols)];
        for group in &mut self.groups {
            (group.h, group.c, group.g) = (empty(), differs.then(empty), differs.then(empty));
        }
    }

    fn copy(&mut self, slice: &MeanSlice) {
        let k = self.cols;
        let mut start = 0;
        for (matrix, part) in parts(slice.differs).iter().enumerate() {
            for global in slice.rows.clone() {
                let (group, row) = (&mut self.groups[global / k], global % k);
                let out = match matrix {
                    0 => Some(&mut group.h),
                    1 => group.c.as_mut(),
                    _ => group.g.as_mut(),
                };
                let width = part.width(row, k);
                if let Some(out) = out {
                    out[row * k..row * k + width].copy_from_slice(&slice.means[start..start + width]);
                }
                start += width;
            }
        }
    }

    /// Some rows again, as they came. `None` unless all of them are in.
    pub fn slice(&self, rows: Range<usize>) -> Option<MeanSlice> {
        let (positions, differs) = self.form.filter(|_| self.has(&rows))?;
        let k = self.cols;
        let mut means = Vec::with_capacity(entries(&rows, k, differs));
        for (matrix, part) in parts(differs).iter().enumerate() {
            for global in rows.clone() {
                let (group, row) = (&self.groups[global / k], global % k);
                let values = match matrix {
                    0 => Some(&group.h),
                    1 => group.c.as_ref(),
                    _ => group.g.as_ref(),
                };
                let width = part.width(row, k);
                means.extend(values.iter().flat_map(|values| &values[row * k..row * k + width]));
            }
        }
        Some(MeanSlice { cols: k, rows, positions, differs, means })
    }

    /// Fills the upper triangles: from now on [`Self::groups`] are what a solver reads.
    ///
    /// # Errors
    /// `Internal` if rows are missing.
    pub fn complete(&mut self) -> Result<(), ExecError> {
        if let Some(row) = self.there.iter().position(|there| !there) {
            return Err(ExecError::Internal(format!("means: row {row} of {} is missing", self.there.len())));
        }
        if self.form.is_none() {
            return Err(ExecError::Internal("means without any slice".into()));
        }
        for group in self.groups.iter_mut().filter(|_| !self.complete) {
            cpu::mirror_lower(&mut group.h, self.cols);
            if let Some(g) = &mut group.g {
                cpu::mirror_lower(g, self.cols);
            }
        }
        self.complete = true;
        Ok(())
    }

    /// The matrices, and the sample rows if there are any; whole once [`Self::complete`] has said so.
    pub fn groups(&self) -> &[GroupMeans] {
        &self.groups
    }

    /// The same, to add sample rows.
    pub fn groups_mut(&mut self) -> &mut [GroupMeans] {
        &mut self.groups
    }

    /// The same, for good.
    pub fn into_groups(self) -> Vec<GroupMeans> {
        self.groups
    }

    /// Positions behind the means, of all uses.
    pub fn positions(&self) -> u64 {
        self.form.map_or(0, |(positions, _)| positions)
    }
}
