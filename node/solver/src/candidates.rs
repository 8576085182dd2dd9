//! Choosing among roundings row by row, and the guard.
//!
//! Gram objective: the solver's roundings compete on the damped objective they were made for; the guard compares the winner
//! with nearest and the start on the *undamped* objective. Values come from f32 products; where two are closer than those
//! can tell, both are computed in f64 from H, C and w. Samples objective with an activation: all compete on the objective
//! itself, summed in f64 over all samples.
//!
//! Not here: making roundings.

use halfstep_compute::{Device, DeviceError};

use crate::grid::Cells;
use crate::quadratic::{Pair, Quadratic, RowValue};
use crate::workspace::Arrays;

/// A rounding of the chunk with its value per row.
#[derive(Debug, Clone)]
pub(crate) struct Candidate<V> {
    /// 1.0: ceil; `[rows, cols]`.
    pub(crate) up: Vec<f32>,
    /// Per row.
    pub(crate) values: Vec<V>,
}

/// A fallback against what a row has.
pub(crate) struct Contest<'a, V> {
    pub(crate) row: usize,
    pub(crate) fallback: &'a Candidate<V>,
    pub(crate) kept: &'a Candidate<V>,
}

/// Decides between roundings.
pub(crate) trait Judge<V> {
    /// Whether `a` is strictly better than `b` in a row, as a result of the solver.
    fn prefers(&self, row: usize, a: &Candidate<V>, b: &Candidate<V>) -> bool;
    /// Of each contest (one per row at most), whether the fallback is strictly better on the calibration objective.
    fn beaten(&mut self, contests: &[Contest<'_, V>]) -> Result<Vec<bool>, DeviceError>;
}

/// The gram objective's judge.
pub(crate) struct ByQuadratic<'a, D: Device> {
    pub(crate) device: &'a D,
    pub(crate) quadratic: &'a Quadratic<'a, D::Buffer>,
    pub(crate) cells: &'a Cells,
    /// Scratch.
    pub(crate) arrays: &'a mut Arrays<D::Buffer>,
}

impl<D: Device> ByQuadratic<'_, D> {
    /// What f32 values tell; nothing if they are too close.
    fn told(&self, contest: &Contest<'_, RowValue>) -> Option<bool> {
        let Contest { row, fallback, kept } = *contest;
        let (left, right) = (fallback.values[row], kept.values[row]);
        if (left.plain - right.plain).abs() > left.uncertainty + right.uncertainty {
            return Some(left.plain < right.plain);
        }
        let same = self.quadratic.row(&fallback.up, row) == self.quadratic.row(&kept.up, row);
        same.then_some(false)
    }
}

impl<D: Device> Judge<RowValue> for ByQuadratic<'_, D> {
    fn prefers(&self, row: usize, a: &Candidate<RowValue>, b: &Candidate<RowValue>) -> bool {
        a.values[row].damped < b.values[row].damped
    }

    fn beaten(&mut self, contests: &[Contest<'_, RowValue>]) -> Result<Vec<bool>, DeviceError> {
        let told: Vec<Option<bool>> = contests.iter().map(|contest| self.told(contest)).collect();
        let open = contests.iter().zip(&told).filter(|(_, told)| told.is_none());
        let pairs: Vec<Pair<'_>> =
            open.map(|(c, _)| Pair { row: c.row, first: &c.fallback.up, second: &c.kept.up }).collect();
        // All at once: the statistics are read once, not once per row.
        let exact = self.quadratic.differences(self.device, self.cells, &pairs, self.arrays)?;
        let mut exact = exact.into_iter().map(|difference| difference < 0.0);
        Ok(told.into_iter().map(|told| told.unwrap_or_else(|| exact.next().unwrap_or(false))).collect())
    }
}

/// Values that are the objective itself.
pub(crate) struct ByValue;

impl Judge<f64> for ByValue {
    fn prefers(&self, row: usize, a: &Candidate<f64>, b: &Candidate<f64>) -> bool {
        a.values[row] < b.values[row]
    }
    fn beaten(&mut self, contests: &[Contest<'_, f64>]) -> Result<Vec<bool>, DeviceError> {
        Ok(contests.iter().map(|c| c.fallback.values[c.row] < c.kept.values[c.row]).collect())
    }
}

/// The best rounding of every row, its values, and how many rows the guard replaced.
///
/// `fallbacks`: nearest first, then the start if it is another; a row goes to the best of them if one beats the solver's.
///
/// # Errors
/// The judge's.
pub(crate) fn select<'a, V: Copy>(
    judge: &mut impl Judge<V>,
    rows: usize,
    cols: usize,
    solved: &'a [Candidate<V>],
    fallbacks: &'a [Candidate<V>],
) -> Result<(Candidate<V>, usize), DeviceError> {
    let prefers = &*judge;
    let better = |row: usize| {
        move |best: Option<&'a Candidate<V>>, next: &'a Candidate<V>| match best {
            Some(best) if !prefers.prefers(row, next, best) => Some(best),
            _ => Some(next),
        }
    };
    let winners: Vec<Option<&Candidate<V>>> =
        (0..rows).map(|row| solved.iter().fold(None, better(row))).collect();
    let mut kept = winners.clone();
    for fallback in fallbacks {
        let contest = |(row, kept): (usize, &Option<&'a Candidate<V>>)| {
            kept.map(|kept| Contest { row, fallback, kept })
        };
        let contests: Vec<Contest<'_, V>> = kept.iter().enumerate().filter_map(contest).collect();
        let beaten: Vec<usize> = contests
            .iter()
            .zip(judge.beaten(&contests)?)
            .filter(|(_, beaten)| *beaten)
            .map(|(c, _)| c.row)
            .collect();
        beaten.into_iter().for_each(|row| kept[row] = Some(fallback));
        kept.iter_mut().for_each(|kept| *kept = kept.or(Some(fallback)));
    }
    let (mut up, mut values) = (Vec::with_capacity(rows * cols), Vec::with_capacity(rows));
    for (row, kept) in kept.iter().enumerate() {
        let Some(kept) = kept else { break };
        up.extend_from_slice(&kept.up[row * cols..][..cols]);
        values.push(kept.values[row]);
    }
    let replaced = |(winner, kept): (&Option<&Candidate<V>>, &Option<&Candidate<V>>)| {
        winner.is_some_and(|winner| !kept.is_some_and(|kept| std::ptr::eq(winner, kept)))
    };
    let guarded = winners.iter().zip(&kept).filter(|pair| replaced(*pair)).count();
    Ok((Candidate { up, values }, guarded))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(mark: f32, values: [f64; 3]) -> Candidate<f64> {
        Candidate { up: vec![mark; 3], values: values.to_vec() }
    }

    #[test]
    fn each_row_takes_its_best_and_the_guard_counts_what_it_replaced() {
        let solved = [candidate(1.0, [3.0, 1.0, 5.0]), candidate(2.0, [2.0, 4.0, 5.0])];
        let fallbacks = [candidate(0.0, [2.0, 2.0, 4.0])];
        let (best, guarded) = select(&mut ByValue, 3, 1, &solved, &fallbacks).unwrap();
        assert_eq!((best.up, best.values, guarded), (vec![2.0, 1.0, 0.0], vec![2.0, 1.0, 4.0], 1));
    }

    #[test]
    fn without_solver_results_the_best_fallback_is_taken_and_nothing_counts_as_guarded() {
        let fallbacks = [candidate(0.0, [2.0, 2.0, 4.0]), candidate(1.0, [3.0, 1.0, 4.0])];
        let (best, guarded) = select(&mut ByValue, 3, 1, &[], &fallbacks).unwrap();
        assert_eq!((best.up, guarded), (vec![0.0, 1.0, 0.0], 0));
    }
}
