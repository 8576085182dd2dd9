//! A layer's means while its slices come, and afterwards: whole matrices, from which any slice can be read again.
//!
//! Slices are kept as they came until all are in; then each is copied to its rows and dropped, and the upper triangles of H and G,
//! which come as lower ones, are filled: by as many threads as wait for it. So nothing but a slice is held twice.
//! Not here: where slices come from, who asks for them (`agent`).

use crate::error::ExecError;
use crate::slice::{MeanSlice, entries, parts};
use crate::statistics::GroupMeans;
use halfstep_compute::cpu;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// See the module. Slices of one layer are of one form: that of the first.
#[derive(Debug, Default)]
pub struct LayerMeans {
    cols: usize,
    /// Positions of all uses, and whether C and G follow H; of the first slice.
    form: Option<(u64, bool)>,
    /// Whether a row is in, rows of all groups one after the other.
    there: Vec<bool>,
    /// By first row; empty once the matrices are there.
    slices: BTreeMap<usize, Arc<MeanSlice>>,
    complete: bool,
    groups: Vec<GroupMeans>,
}

/// Rows of one matrix that a slice is copied to.
struct Room<'a> {
    /// Which of the slice's matrices.
    number: usize,
    /// Counted over all groups.
    rows: Range<usize>,
    /// `[rows, cols]`.
    out: &'a mut [f32],
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

    /// Keeps a slice.
    ///
    /// # Errors
    /// `Internal` if it is not of the layer's form, or a row is in already: then it is not kept.
    pub fn place(&mut self, slice: Arc<MeanSlice>) -> Result<(), ExecError> {
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
        self.form.get_or_insert(form);
        self.there[slice.rows.clone()].fill(true);
        if !slice.rows.is_empty() {
            self.slices.insert(slice.rows.start, slice);
        }
        Ok(())
    }

    /// Some rows again, as they came. `None` unless all of them are in.
    pub fn slice(&self, rows: Range<usize>) -> Option<MeanSlice> {
        let (positions, differs) = self.form.filter(|_| self.has(&rows))?;
        let k = self.cols;
        let mut means = Vec::with_capacity(entries(&rows, k, differs));
        for (number, part) in parts(differs).iter().enumerate() {
            for row in rows.clone() {
                means.extend_from_slice(self.row(number, row)?.get(..part.width(row % k, k))?);
            }
        }
        Some(MeanSlice { cols: k, rows, positions, differs, means })
    }

    /// A row of H, C or G, at least what is kept of it.
    fn row(&self, number: usize, row: usize) -> Option<&[f32]> {
        let k = self.cols;
        if self.complete {
            let group = self.groups.get(row / k)?;
            let matrix = match number {
                0 => Some(&group.h),
                1 => group.c.as_ref(),
                _ => group.g.as_ref(),
            };
            return matrix?.get(row % k * k..(row % k + 1) * k);
        }
        let (_, slice) = self.slices.range(..=row).next_back()?;
        slice.entries_from(number, row)
    }

    /// Makes the matrices, by at most `threads` threads: from now on [`Self::groups`] are what a solver reads.
    ///
    /// # Errors
    /// `Internal` if rows are missing.
    pub fn complete(&mut self, threads: usize) -> Result<(), ExecError> {
        if let Some(row) = self.there.iter().position(|there| !there) {
            return Err(ExecError::Internal(format!("means: row {row} of {} is missing", self.there.len())));
        }
        let Some((_, differs)) = self.form else {
            return Err(ExecError::Internal("means without any slice".into()));
        };
        if self.complete {
            return Ok(());
        }
        // Zeros: memory that is not written is not there yet.
        let empty = || vec![0.0; self.cols.saturating_mul(self.cols)];
        for group in &mut self.groups {
            (group.h, group.c, group.g) = (empty(), differs.then(empty), differs.then(empty));
        }
        let slices = std::mem::take(&mut self.slices);
        let work = rooms(slices, &mut self.groups, self.cols);
        let copying = threads.min(work.len());
        let queue = Mutex::new(work.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let copy = || {
            while let Some((slice, rooms)) = next() {
                rooms.into_iter().for_each(|room| slice.copy_to(room));
            }
        };
        std::thread::scope(|scope| {
            (1..copying).for_each(|_| drop(scope.spawn(copy)));
            copy();
        });
        for group in &mut self.groups {
            cpu::mirror_lower_by(&mut group.h, self.cols, threads);
            if let Some(g) = &mut group.g {
                cpu::mirror_lower_by(g, self.cols, threads);
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

/// Every slice with its rows of the matrices. Slices follow each other without a gap.
fn rooms(
    slices: BTreeMap<usize, Arc<MeanSlice>>,
    groups: &mut [GroupMeans],
    k: usize,
) -> Vec<(Arc<MeanSlice>, Vec<Room<'_>>)> {
    // What is left of each matrix, group after group.
    let mut left: Vec<Vec<&mut [f32]>> = groups
        .iter_mut()
        .map(|group| {
            let others = [&mut group.c, &mut group.g].into_iter().flatten();
            std::iter::once(&mut group.h).chain(others).map(Vec::as_mut_slice).collect()
        })
        .collect();
    let with_rooms = |slice: Arc<MeanSlice>| {
        let mut rooms = Vec::new();
        let mut row = slice.rows.start;
        while row < slice.rows.end {
            let end = slice.rows.end.min((row / k + 1) * k);
            for (number, matrix) in left[row / k].iter_mut().enumerate() {
                let (out, rest) = std::mem::take(matrix).split_at_mut((end - row) * k);
                *matrix = rest;
                rooms.push(Room { number, rows: row..end, out });
            }
            row = end;
        }
        (slice, rooms)
    };
    slices.into_values().map(with_rooms).collect()
}

impl MeanSlice {
    /// The entries of one matrix from a row on.
    fn entries_from(&self, number: usize, row: usize) -> Option<&[f32]> {
        let parts = parts(self.differs);
        let before: usize =
            parts[..number].iter().map(|part| part.entries_of(self.rows.clone(), self.cols)).sum();
        let start = before + parts.get(number)?.entries_of(self.rows.start..row, self.cols);
        self.means.get(start..)
    }

    fn copy_to(&self, room: Room<'_>) {
        let k = self.cols;
        let part = parts(self.differs)[room.number];
        let mut from = self.entries_from(room.number, room.rows.start).unwrap_or_default();
        for (row, line) in room.rows.zip(room.out.chunks_exact_mut(k)) {
            let (entries, rest) = from.split_at(part.width(row % k, k));
            line[..entries.len()].copy_from_slice(entries);
            from = rest;
        }
    }
}
