//! The MSE search's input, checked and put in the form in which another device than the CPU does the search.
//!
//! Not here: the search on the CPU (`mse_search`), the other device's.

use crate::range::{check_weights, normalised};
use crate::{Encodings, Granularity, GridSpec, QuantError, RangeEstimator};

/// Grids to be searched for, each of a row or of a run of one, with the checks of [`crate::estimate`] behind them.
#[derive(Debug, Clone)]
pub struct MseGrids {
    spec: GridSpec,
    rows: usize,
    cols: usize,
    importance: Vec<f32>,
}

impl MseGrids {
    /// Nothing if `spec` asks for another estimator, or for one grid of the whole matrix: then nothing is looked at either.
    ///
    /// # Errors
    /// Those of [`crate::estimate`].
    pub fn new(
        spec: &GridSpec,
        w: &[f32],
        rows: usize,
        cols: usize,
        importance: Option<&[f32]>,
    ) -> Result<Option<Self>, QuantError> {
        if spec.range != RangeEstimator::Mse || spec.granularity == Granularity::PerTensor {
            return Ok(None);
        }
        spec.validate()?;
        check_weights(w, rows, cols)?;
        let mut importance = match importance {
            Some(values) => normalised(values, cols)?,
            None => vec![1.0; cols],
        };
        // Columns nobody weighs cannot be told apart.
        for run in importance.chunks_mut(width(spec, cols)) {
            if run.iter().all(|value| *value == 0.0) {
                run.fill(1.0);
            }
        }
        Ok(Some(Self { spec: *spec, rows, cols, importance }))
    }

    /// Of each column, `[cols]`: not negative, at most 1, not 0 for all columns of a grid.
    pub fn importance(&self) -> &[f32] {
        &self.importance
    }

    /// Columns of a grid; a row's last may be narrower.
    pub fn width(&self) -> usize {
        width(&self.spec, self.cols)
    }

    /// Smallest and largest integer.
    pub fn integers(&self) -> (i32, i32) {
        self.spec.scheme.integer_range(self.spec.bits)
    }

    /// Whether all zero points are 0.
    pub fn is_symmetric(&self) -> bool {
        self.spec.scheme.is_symmetric()
    }

    /// The encodings with what was found for each grid, row by row.
    ///
    /// # Errors
    /// What [`Encodings::validate`] finds.
    pub fn encodings(self, scale: Vec<f32>, zero_point: Vec<i32>) -> Result<Encodings, QuantError> {
        let GridSpec { bits, scheme, granularity, .. } = self.spec;
        let Self { rows, cols, .. } = self;
        let encodings = Encodings { bits, scheme, granularity, rows, cols, scale, zero_point };
        encodings.validate()?;
        Ok(encodings)
    }
}

fn width(spec: &GridSpec, cols: usize) -> usize {
    match spec.granularity {
        Granularity::PerGroup { group_size } => group_size.clamp(1, cols.max(1)),
        _ => cols.max(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scheme;

    fn spec(granularity: Granularity, range: RangeEstimator) -> GridSpec {
        GridSpec { bits: 4, scheme: Scheme::Asymmetric, granularity, range }
    }

    #[test]
    fn columns_that_nobody_weighs_weigh_alike_and_what_is_not_searched_here_is_nothing() {
        let group = spec(Granularity::PerGroup { group_size: 2 }, RangeEstimator::Mse);
        let grids =
            MseGrids::new(&group, &[1.0; 5], 1, 5, Some(&[0.0, 0.0, 4.0, 0.0, 0.0])).unwrap().unwrap();
        assert_eq!(grids.importance(), [1.0, 1.0, 1.0, 0.0, 1.0]);
        assert_eq!((grids.width(), grids.integers(), grids.is_symmetric()), (2, (0, 15), false));
        let encodings = grids.encodings(vec![0.5; 3], vec![1, 2, 3]).unwrap();
        assert_eq!((encodings.scale_at(0, 4), encodings.zero_point_at(0, 3)), (0.5, 2));
        for other in [
            spec(Granularity::PerTensor, RangeEstimator::Mse),
            spec(group.granularity, RangeEstimator::MinMax),
        ] {
            assert!(MseGrids::new(&other, &[1.0; 5], 1, 5, None).unwrap().is_none());
        }
    }

    #[test]
    fn what_the_estimator_refuses_is_refused() {
        let row = spec(Granularity::PerChannel, RangeEstimator::Mse);
        let weights = [1.0, f32::NAN];
        let refused = |w: &[f32], importance: Option<&[f32]>| {
            let new = MseGrids::new(&row, w, 1, 2, importance).unwrap_err();
            let estimate = crate::estimate(&row, w, 1, 2, importance).unwrap_err();
            assert_eq!(new.to_string(), estimate.to_string());
        };
        refused(&weights, None);
        refused(&weights[..1], None);
        refused(&[1.0; 2], Some(&[1.0, -1.0]));
        refused(&[1.0; 2], Some(&[1.0]));
        let grids = MseGrids::new(&row, &[1.0; 2], 1, 2, None).unwrap().unwrap();
        assert_eq!(grids.width(), 2);
        assert!(grids.encodings(vec![], vec![]).is_err());
    }
}
