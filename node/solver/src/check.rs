//! Refuses problems that do not fit together or hold unusable numbers, naming the entry.
//!
//! Not here: whether the statistics are good enough.

use crate::problem::{GramView, SamplesView};
use crate::{Activation, RowProblem, SolveError, Statistics};

/// Checks shapes, encodings, finiteness of everything but the statistics; after both everything may index freely.
pub(crate) fn check(problem: &RowProblem<'_>) -> Result<(), SolveError> {
    let (rows, cols) = (problem.rows, problem.cols);
    let encodings = problem.encodings;
    encodings.validate().map_err(|source| SolveError::Encodings { first_row: problem.first_row, source })?;
    length("rows of the encodings", rows, encodings.rows)?;
    length("columns of the encodings", cols, encodings.cols)?;
    matrix("weights", problem.w, rows, cols, problem.first_row)?;
    if let Some(bias) = problem.bias {
        matrix("bias", bias, rows, 1, problem.first_row)?;
    }
    finite("output scale", &[problem.output_scale], 1, 0)?;
    problem.activation.per_row(rows)?;
    match &problem.statistics {
        Statistics::Gram(_) if problem.activation != Activation::Identity => {
            Err(SolveError::ActivationNeedsSamples { activation: format!("{:?}", problem.activation) })
        }
        _ => Ok(()),
    }
}

/// Checks the statistics of `cols` inputs.
pub(crate) fn check_statistics(statistics: &Statistics<'_>, cols: usize) -> Result<(), SolveError> {
    match statistics {
        Statistics::Gram(moments) => gram(moments, cols),
        Statistics::Samples(view) => samples(view, cols),
    }
}

fn gram(moments: &GramView<'_>, cols: usize) -> Result<(), SolveError> {
    check_shapes(moments, cols)?;
    for (what, matrix) in matrices(moments) {
        finite(what, matrix, cols, 0)?;
    }
    check_diagonal(moments, cols)
}

fn matrices<'a>(moments: &GramView<'a>) -> impl Iterator<Item = (&'static str, &'a [f32])> {
    let energy = moments.g_energy.map(|energy| ("gram G", energy));
    [("gram H", moments.h), ("cross gram C", moments.c)].into_iter().chain(energy)
}

/// Checks all of second moments that does not take a look at every entry: whoever calls this sees to it that they are finite.
pub(crate) fn check_shapes(moments: &GramView<'_>, cols: usize) -> Result<(), SolveError> {
    if moments.count.is_nan() || moments.count <= 0.0 {
        return Err(SolveError::NoSamples { what: "gram statistics" });
    }
    for (what, matrix) in matrices(moments) {
        length(what, cols.saturating_mul(cols), matrix.len())?;
    }
    Ok(())
}

/// Refuses a diagonal that is no mean of squares.
pub(crate) fn check_diagonal(moments: &GramView<'_>, cols: usize) -> Result<(), SolveError> {
    match (0..cols).find(|j| moments.h[j * cols + j] < 0.0) {
        Some(index) => Err(SolveError::NegativeDiagonal {
            what: "gram H",
            index,
            value: moments.h[index * cols + index],
        }),
        None => Ok(()),
    }
}

fn samples(view: &SamplesView<'_>, cols: usize) -> Result<(), SolveError> {
    if view.n == 0 {
        return Err(SolveError::NoSamples { what: "samples" });
    }
    if u32::try_from(view.n).is_err() {
        return Err(SolveError::Length { what: "samples", expected: u32::MAX as usize, actual: view.n });
    }
    matrix("samples x_q", view.x_q, view.n, cols, 0)?;
    matrix("samples x_fp", view.x_fp, view.n, cols, 0)
}

fn length(what: &'static str, expected: usize, actual: usize) -> Result<(), SolveError> {
    if expected == actual { Ok(()) } else { Err(SolveError::Length { what, expected, actual }) }
}

fn matrix(
    what: &'static str,
    values: &[f32],
    rows: usize,
    cols: usize,
    first_row: usize,
) -> Result<(), SolveError> {
    length(what, rows.saturating_mul(cols), values.len())?;
    finite(what, values, cols, first_row)
}

fn finite(what: &'static str, values: &[f32], cols: usize, first_row: usize) -> Result<(), SolveError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(SolveError::NonFinite {
            what,
            row: first_row + index / cols,
            col: index % cols,
            value: values[index],
        }),
        None => Ok(()),
    }
}
