//! Choosing among roundings row by row, and the guard.
//!
//! Gram objective: the solver's roundings compete on the damped objective they were made for; the guard compares the winner
//! with nearest and the start on the *undamped* objective. Values come from f32 products; where two are closer than those
//! can tell, both are computed in f64 from H, C and w. Samples objective with an activation: all compete on the objective
//! itself, summed in f64 over all samples.
//!
//! Not here: making roundings.

use crate::grid::Cells;
use crate::quadratic::{Quadratic, RowValue};

/// A rounding of the chunk with its value per row.
#[derive(Debug, Clone)]
pub(crate) struct Candidate<V> {
    /// 1.0: ceil; `[rows, cols]`.
    pub(crate) up: Vec<f32>,
    /// Per row.
    pub(crate) values: Vec<V>,
}

/// Decides between roundings of one row.
pub(crate) trait Judge<V> {
    /// Whether `a` is strictly better than `b` as a result of the solver.
    fn prefers(&self, row: usize, a: &Candidate<V>, b: &Candidate<V>) -> bool;
    /// Whether `a` is strictly better than `b` on the calibration objective.
    fn beats(&self, row: usize, a: &Candidate<V>, b: &Candidate<V>) -> bool;
}

/// The gram objective's judge.
pub(crate) struct ByQuadratic<'a, B> {
    pub(crate) quadratic: &'a Quadratic<'a, B>,
    pub(crate) cells: &'a Cells,
}

impl<B: Send + Sync> Judge<RowValue> for ByQuadratic<'_, B> {
    fn prefers(&self, row: usize, a: &Candidate<RowValue>, b: &Candidate<RowValue>) -> bool {
        a.values[row].damped < b.values[row].damped
    }

    fn beats(&self, row: usize, a: &Candidate<RowValue>, b: &Candidate<RowValue>) -> bool {
        let cols = self.quadratic.cols;
        if self.quadratic.row(&a.up, row) == self.quadratic.row(&b.up, row) {
            return false;
        }
        let (left, right) = (a.values[row], b.values[row]);
        if (left.plain - right.plain).abs() > left.uncertainty + right.uncertainty {
            return left.plain < right.plain;
        }
        let exact =
            |up: &[f32]| self.quadratic.exact(row, |j| self.cells.error(row * cols + j, up[row * cols + j]));
        exact(&a.up) < exact(&b.up)
    }
}

/// Values that are the objective itself.
pub(crate) struct ByValue;

impl Judge<f64> for ByValue {
    fn prefers(&self, row: usize, a: &Candidate<f64>, b: &Candidate<f64>) -> bool {
        a.values[row] < b.values[row]
    }
    fn beats(&self, row: usize, a: &Candidate<f64>, b: &Candidate<f64>) -> bool {
        a.values[row] < b.values[row]
    }
}

/// The best rounding of every row, its values, and how many rows the guard replaced.
///
/// `fallbacks`: nearest first, then the start if it is another; a row goes to the best of them if one beats the solver's.
pub(crate) fn select<V: Copy>(
    judge: &impl Judge<V>,
    rows: usize,
    cols: usize,
    solved: &[Candidate<V>],
    fallbacks: &[Candidate<V>],
) -> (Candidate<V>, usize) {
    let mut up = Vec::with_capacity(rows * cols);
    let mut values = Vec::with_capacity(rows);
    let mut guarded = 0;
    for row in 0..rows {
        let better = |best: Option<_>, next| match best {
            Some(best) if !judge.prefers(row, next, best) => Some(best),
            _ => Some(next),
        };
        let winner: Option<&Candidate<V>> = solved.iter().fold(None, better);
        let mut kept = winner;
        for fallback in fallbacks {
            kept = match kept {
                Some(kept) if !judge.beats(row, fallback, kept) => Some(kept),
                _ => Some(fallback),
            };
        }
        let Some(kept) = kept else { break };
        guarded += usize::from(winner.is_some_and(|winner| !std::ptr::eq(winner, kept)));
        up.extend_from_slice(&kept.up[row * cols..][..cols]);
        values.push(kept.values[row]);
    }
    (Candidate { up, values }, guarded)
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
        let (best, guarded) = select(&ByValue, 3, 1, &solved, &fallbacks);
        assert_eq!((best.up, best.values, guarded), (vec![2.0, 1.0, 0.0], vec![2.0, 1.0, 4.0], 1));
    }

    #[test]
    fn without_solver_results_the_best_fallback_is_taken_and_nothing_counts_as_guarded() {
        let fallbacks = [candidate(0.0, [2.0, 2.0, 4.0]), candidate(1.0, [3.0, 1.0, 4.0])];
        let (best, guarded) = select(&ByValue, 3, 1, &[], &fallbacks);
        assert_eq!((best.up, guarded), (vec![0.0, 1.0, 0.0], 0));
    }
}
