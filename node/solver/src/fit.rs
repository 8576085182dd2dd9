//! Scales fitted to a rounding: for fixed integers the gram objective is a quadratic in the row's scales as well.
//!
//! With levels `k = q - zero_point` and the groups' indicator matrix, `w~ = sum_g s_g k_g`, so the best scales solve
//! `M s = r`, `M[g, g'] = k_g H k_g'`: as many unknowns as the row has groups. The scales are brought to the type they are stored
//! in, the integers are refined on the new grid, and this is repeated; a row keeps what lowers its objective.
//!
//! Deviation: AdaRound leaves the grid as the range search chose it. Scales are what every format stores in any case, and
//! the guard holds: a row is never worse than before.
//! Not here: choosing the first scales (`quant`), the samples objective (it would need the activation's derivative).

use halfstep_compute::{Device, DeviceError};
use halfstep_quant::{Encodings, Granularity, ScaleType};

use crate::grid::Cells;
use crate::quadratic::{Quadratic, RowValue};
use crate::solve::{finite, solve_keeping};
use crate::workspace::{Arrays, Watch};
use crate::{Prepared, RowProblem, Settings, Solution, SolveError, Statistics, Step, Workspace, refine};

/// A scale moves by at most this factor in one round: a larger step says that the model does not hold.
const STEP_MAX: f32 = 2.0;
/// Added to the normal equations' diagonal, as a fraction of it: groups whose levels explain each other stay where they are.
const RIDGE: f64 = 1e-6;

/// [`crate::solve_prepared`], then up to `settings.scale_fits` rounds of fitting scales; returns the chunk with its encodings.
///
/// What cannot be fitted comes back as it was solved: a scale shared by the whole tensor, the samples objective. The report's objective
/// of nearest rounding stays that of the original grid; `rounded_away` counts from nearest on the new one.
///
/// # Errors
/// The same.
pub fn solve_fitted<D: Device>(
    device: &D,
    prepared: &Prepared<D::Buffer>,
    problem: &RowProblem<'_>,
    settings: &Settings,
    stored: ScaleType,
    workspace: &mut Workspace<D::Buffer>,
    watch: &mut dyn FnMut(Step),
) -> Result<(Encodings, Solution), SolveError> {
    let (solution, mut quadratic, mut cells) =
        solve_keeping(device, prepared, problem, settings, workspace, watch)?;
    let encodings = problem.encodings.clone();
    let fits = matches!(problem.statistics, Statistics::Gram(_)) && settings.scale_fits > 0;
    if !fits || encodings.granularity == Granularity::PerTensor {
        watch(Step::Done);
        return Ok((encodings, solution));
    }
    let arrays = workspace.arrays(device, problem.rows, problem.cols)?;
    watch(Step::Measure);
    let mut best = Fit { encodings, q: solution.q };
    let mut reached = best.values(device, settings, &cells, &quadratic, None, arrays)?.1;
    let all: Vec<u32> = (0..problem.rows as u32).collect();
    device.copy_rows(problem.cols, &all, &arrays.product, &mut arrays.m1)?;
    for _ in 0..settings.scale_fits {
        watch(Step::Fit);
        let encodings = best.proposal(device, &quadratic, stored, arrays)?;
        let mut next = Fit { encodings, q: best.q.clone() };
        watch(Step::Regrid);
        cells.renew(problem.w, &next.encodings, &prepared.dead);
        quadratic.regrid(&cells, problem, settings);
        let (q, fitted) = next.values(device, settings, &cells, &quadratic, Some(watch), arrays)?;
        next.q = q;
        let better = |row: usize| {
            let (new, old) = (fitted.values[row], reached.values[row]);
            new.damped < old.damped && new.plain + new.uncertainty < old.plain - old.uncertainty
        };
        let rows: Vec<u32> = all.iter().copied().filter(|row| better(*row as usize)).collect();
        if rows.is_empty() {
            break;
        }
        for row in rows.iter().map(|row| *row as usize) {
            best.take_row(row, &next);
            reached.take_row(row, &fitted);
        }
        // A row's product does not depend on the others': nothing has to be multiplied again.
        device.copy_rows(problem.cols, &rows, &arrays.product, &mut arrays.m1)?;
        quadratic.unit.clone_from(&reached.unit);
    }
    finite("objective", reached.values.iter().map(|value| value.damped), problem)?;
    let mut report = solution.report;
    report.objective = quadratic.total(&reached.values, problem.output_scale);
    let nearest = best.encodings.quantize_nearest(problem.w);
    report.rounded_away = best.q.iter().zip(&nearest).filter(|(q, nearest)| q != nearest).count();
    watch(Step::Done);
    Ok((best.encodings, Solution { q: best.q, report }))
}

/// What a grid's integers reach, row by row; `errors * H` in row units is on the device.
struct Reached {
    values: Vec<RowValue>,
    /// The row units.
    unit: Vec<f32>,
}

impl Reached {
    fn take_row(&mut self, row: usize, from: &Self) {
        self.values[row] = from.values[row];
        self.unit[row] = from.unit[row];
    }
}

/// A grid and the integers on it.
struct Fit {
    encodings: Encodings,
    q: Vec<i32>,
}

impl Fit {
    /// Puts the integers on the device and, with `watch`, refines them; returns them and what they reach, whose errors' product
    /// with H it leaves in `arrays.product`.
    fn values<D: Device>(
        &self,
        device: &D,
        settings: &Settings,
        cells: &Cells,
        quadratic: &Quadratic<'_, D::Buffer>,
        watch: Option<Watch<'_>>,
        arrays: &mut Arrays<D::Buffer>,
    ) -> Result<(Vec<i32>, Reached), DeviceError> {
        quadratic.load(device, cells, arrays)?;
        let mut up = cells.choices(&self.q);
        if let Some(watch) = watch {
            refine::refine(device, quadratic, settings.refine_sweeps, &mut up, arrays, watch)?;
        }
        let values = quadratic.evaluate(device, &up, arrays)?;
        Ok((cells.integers(&up), Reached { values, unit: quadratic.unit.clone() }))
    }

    /// The encodings with the best scales for the integers, row by row; their errors' product with H is in `arrays.m1`.
    fn proposal<D: Device>(
        &self,
        device: &D,
        quadratic: &Quadratic<'_, D::Buffer>,
        stored: ScaleType,
        arrays: &mut Arrays<D::Buffer>,
    ) -> Result<Encodings, DeviceError> {
        let (rows, cols) = (quadratic.rows, quadratic.cols);
        let (width, groups) = (self.encodings.group_cols(), self.encodings.groups_per_row());
        let Arrays { soft: levels, product, m1: kept, linear, .. } = arrays;
        device.write(&self.levels(), levels)?;
        // Half the gradient of a group's scale is its levels times `e H + d e + b`.
        let products = device.run_dots(rows, cols, width, kept, levels)?;
        let linears = device.run_dots(rows, cols, width, linear, levels)?;
        let terms = products.into_iter().zip(linears).enumerate();
        let mut pull: Vec<f64> = terms
            .map(|(at, (product, linear))| -(product * quadratic.inverse_unit(at / groups) + linear))
            .collect();
        // `M[g, g'] = k_g H k_g'`, lower triangles.
        let h = &quadratic.prepared.damped;
        let mut normal = device.normal_equations(rows, cols, width, levels, h, product)?;
        let mut encodings = self.encodings.clone();
        for (row, (normal, pull)) in
            normal.chunks_exact_mut(groups * groups).zip(pull.chunks_exact_mut(groups)).enumerate()
        {
            if !solve_positive(normal, pull) {
                continue;
            }
            for (scale, step) in encodings.scale[row * groups..][..groups].iter_mut().zip(pull.iter()) {
                let next = stored.nearest((f64::from(*scale) + step) as f32);
                if next.is_normal() && next < *scale * STEP_MAX && next * STEP_MAX > *scale {
                    *scale = next;
                }
            }
        }
        Ok(encodings)
    }

    /// `q - zero_point` as f32, `[rows, cols]`.
    fn levels(&self) -> Vec<f32> {
        let (cols, width) = (self.encodings.cols, self.encodings.group_cols());
        let mut levels = Vec::with_capacity(self.q.len());
        for (row, line) in self.q.chunks_exact(cols).enumerate() {
            for (group, run) in line.chunks(width).enumerate() {
                let zero_point = self.encodings.zero_point_at(row, group * width);
                levels.extend(run.iter().map(|q| (q - zero_point) as f32));
            }
        }
        levels
    }

    fn take_row(&mut self, row: usize, from: &Self) {
        let (cols, groups) = (self.encodings.cols, self.encodings.groups_per_row());
        let (weights, entries) = (row * cols..(row + 1) * cols, row * groups..(row + 1) * groups);
        self.q[weights.clone()].copy_from_slice(&from.q[weights]);
        self.encodings.scale[entries.clone()].copy_from_slice(&from.encodings.scale[entries]);
    }
}

/// Solves `a x = b` in place of `b` by Cholesky, `a` given by its lower triangle; false if `a` is not positive definite.
/// An unknown that nothing depends on (diagonal 0) becomes 0.
fn solve_positive(a: &mut [f64], b: &mut [f64]) -> bool {
    let n = b.len();
    // Of each entry, the terms so far: a column's are added to all entries behind it at once, each entry's in their order.
    let (mut dots, mut column) = (vec![-0.0; n * n], vec![0.0; n]);
    for k in 0..n {
        let diagonal = a[k * n + k];
        let raised = if diagonal > 0.0 { diagonal * (1.0 + RIDGE) } else { 1.0 };
        let value = raised - dots[k * n + k];
        if !(value > 0.0 && value.is_finite()) {
            return false;
        }
        a[k * n + k] = value.sqrt();
        for i in k + 1..n {
            column[i] = (a[i * n + k] - dots[i * n + k]) / a[k * n + k];
            a[i * n + k] = column[i];
        }
        for i in k + 1..n {
            let (line, factor) = (&mut dots[i * n..][..=i], column[i]);
            line[k + 1..].iter_mut().zip(&column[k + 1..=i]).for_each(|(dot, other)| *dot += factor * other);
        }
    }
    for i in 0..n {
        let dot: f64 = (0..i).map(|k| a[i * n + k] * b[k]).sum();
        b[i] = (b[i] - dot) / a[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|k| a[k * n + i] * b[k]).sum();
        b[i] = (b[i] - dot) / a[i * n + i];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use crate::{Activation, GramView, SamplesView, Start, solve};
    use halfstep_compute::Cpu;
    use halfstep_quant::{GridSpec, RangeEstimator, Scheme};

    fn spec(bits: u8, scheme: Scheme, granularity: Granularity) -> GridSpec {
        GridSpec { bits, scheme, granularity, range: RangeEstimator::Mse }
    }

    fn problem<'a>(fixture: &'a Fixture, statistics: Statistics<'a>) -> RowProblem<'a> {
        RowProblem {
            w: &fixture.w,
            rows: fixture.rows,
            cols: fixture.cols,
            encodings: &fixture.encodings,
            bias: None,
            output_scale: 1.0,
            activation: Activation::Identity,
            statistics,
            layer_key: 0,
            first_row: 0,
        }
    }

    fn gram(fixture: &Fixture) -> Statistics<'_> {
        Statistics::Gram(GramView { h: &fixture.h, c: &fixture.c, g_energy: Some(&fixture.g), count: 40.0 })
    }

    fn settings(scale_fits: u32) -> Settings {
        Settings { iterations: 0, start: Start::Gptq, scale_fits, ..Settings::default() }
    }

    fn fitted(problem: &RowProblem<'_>, rounds: u32, stored: ScaleType) -> (Solution, Encodings, Solution) {
        let settings = settings(rounds);
        let mut workspace = Workspace::new();
        let prepared = Prepared::new(&Cpu, &problem.statistics, problem.cols, &settings).unwrap();
        let before = solve(&Cpu, problem, &settings, &mut workspace).unwrap();
        let (encodings, after) =
            solve_fitted(&Cpu, &prepared, problem, &settings, stored, &mut workspace, &mut |_| {}).unwrap();
        (before, encodings, after)
    }

    fn objective(fixture: &Fixture, encodings: &Encodings, q: &[i32], row: usize) -> f64 {
        let rounded: Vec<f32> = (0..fixture.cols)
            .map(|col| {
                (q[row * fixture.cols + col] - encodings.zero_point_at(row, col)) as f32
                    * encodings.scale_at(row, col)
            })
            .collect();
        fixture.objective(row, &rounded, |x| x)
    }

    #[test]
    fn no_row_is_worse_and_the_whole_is_better_by_the_definition_of_the_objective() {
        let grids = [
            (3, Scheme::Symmetric, Granularity::PerChannel),
            (3, Scheme::Symmetric, Granularity::PerGroup { group_size: 8 }),
            (4, Scheme::Asymmetric, Granularity::PerGroup { group_size: 16 }),
        ];
        for (bits, scheme, granularity) in grids {
            for stored in [ScaleType::F32, ScaleType::Bf16] {
                let mut fixture = Fixture::new(11, 6, 40, 160, spec(bits, scheme, granularity));
                fixture.encodings.store_scales_as(stored);
                let (before, encodings, after) = fitted(&problem(&fixture, gram(&fixture)), 4, stored);
                encodings.validate().unwrap();
                let mut totals = [0.0; 2];
                for row in 0..6 {
                    let old = objective(&fixture, &fixture.encodings, &before.q, row);
                    let new = objective(&fixture, &encodings, &after.q, row);
                    assert!(new <= old, "{granularity:?} {stored:?} row {row}: {new} after {old}");
                    totals[0] += old;
                    totals[1] += new;
                }
                assert!(totals[1] < 0.99 * totals[0], "{granularity:?} {stored:?}: {totals:?}");
                assert!((after.report.objective / totals[1] - 1.0).abs() < 1e-3, "the report tells it");
                assert_eq!(after.report.objective_nearest, before.report.objective_nearest);
                assert!(encodings.scale.iter().all(|scale| stored.nearest(*scale) == *scale));
            }
        }
    }

    /// For fixed integers no nearby scale is better than the fitted one, by the definition of the objective.
    #[test]
    fn proposed_scales_are_a_minimum() {
        let fixture =
            Fixture::new(5, 3, 24, 96, spec(3, Scheme::Symmetric, Granularity::PerGroup { group_size: 8 }));
        let problem = problem(&fixture, gram(&fixture));
        let settings = Settings { damping: 0.0, ..settings(1) };
        let mut workspace = Workspace::new();
        let q = solve(&Cpu, &problem, &settings, &mut workspace).unwrap().q;
        let Statistics::Gram(moments) = problem.statistics else { unreachable!("made above") };
        let prepared = Prepared::new(&Cpu, &problem.statistics, 24, &settings).unwrap();
        let fit = Fit { encodings: fixture.encodings.clone(), q };
        let arrays = workspace.arrays(&Cpu, 3, 24).unwrap();
        let cells = Cells::new(problem.w, &fit.encodings, &prepared.dead);
        let quadratic =
            Quadratic::new(&Cpu, &problem, &prepared, moments, &cells, &settings, arrays).unwrap();
        fit.values(&Cpu, &settings, &cells, &quadratic, None, arrays).unwrap();
        Cpu.copy_rows(24, &[0, 1, 2], &arrays.product, &mut arrays.m1).unwrap();
        let proposal = fit.proposal(&Cpu, &quadratic, ScaleType::F32, arrays).unwrap();
        for row in 0..3 {
            let best = objective(&fixture, &proposal, &fit.q, row);
            for group in 0..3 {
                for factor in [0.99, 1.01] {
                    let mut moved = proposal.clone();
                    moved.scale[row * 3 + group] *= factor;
                    let other = objective(&fixture, &moved, &fit.q, row);
                    assert!(best < other, "row {row} group {group} * {factor}: {other} below {best}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_fitted_stays() {
        let fixture = Fixture::new(2, 2, 10, 40, spec(4, Scheme::Symmetric, Granularity::PerTensor));
        let (before, encodings, after) = fitted(&problem(&fixture, gram(&fixture)), 3, ScaleType::F32);
        assert_eq!((&before, &fixture.encodings), (&after, &encodings));
        let fixture = Fixture::new(2, 2, 10, 40, spec(4, Scheme::Symmetric, Granularity::PerChannel));
        let samples = SamplesView { x_q: &fixture.x_q, x_fp: &fixture.x_fp, n: 40 };
        let (before, encodings, after) =
            fitted(&problem(&fixture, Statistics::Samples(samples)), 3, ScaleType::F32);
        assert_eq!((&before, &fixture.encodings), (&after, &encodings));
    }

    #[test]
    fn rows_do_not_depend_on_their_neighbours() {
        let grid = spec(3, Scheme::Symmetric, Granularity::PerGroup { group_size: 16 });
        let fixture = Fixture::new(8, 5, 48, 120, grid);
        let (_, whole, all) = fitted(&problem(&fixture, gram(&fixture)), 2, ScaleType::F16);
        let mut single = Fixture::new(8, 5, 48, 120, grid);
        single.w = fixture.w[3 * 48..4 * 48].to_vec();
        single.rows = 1;
        single.encodings = fixture.encodings.slice_rows(3..4);
        let (_, encodings, one) = fitted(&problem(&single, gram(&single)), 2, ScaleType::F16);
        assert_eq!(one.q, all.q[3 * 48..4 * 48]);
        assert_eq!(encodings, whole.slice_rows(3..4));
    }

    #[test]
    fn positive_systems_are_solved_and_unused_unknowns_are_zero() {
        let mut a = [4.0, 0.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0];
        let mut b = [8.0, 7.0, 5.0];
        assert!(solve_positive(&mut a, &mut b));
        assert!((b[0] - 1.25).abs() < 1e-5 && (b[1] - 1.5).abs() < 1e-5, "{b:?}");
        // `[1, 3, 2; . 18 4; . . 9]` times `[1, -1, 2]`.
        let mut a = [1.0, 0.0, 0.0, 3.0, 18.0, 0.0, 2.0, 4.0, 9.0];
        let mut b = [2.0, -7.0, 16.0];
        assert!(solve_positive(&mut a, &mut b));
        assert!(b.iter().zip([1.0, -1.0, 2.0]).all(|(x, want)| (x - want).abs() < 1e-4), "{b:?}");
        let mut indefinite = [1.0, 0.0, 2.0, 1.0];
        assert!(!solve_positive(&mut indefinite, &mut [1.0, 1.0]));
    }
}
