//! Tests: what is made of statistics on a CUDA device against what the host makes of them; where there is no device the host
//! pretends to be one.
//!
//! Not here: whole solves (`tests/cuda.rs`).

#[path = "../../compute/tests/device/mod.rs"]
mod device;

use halfstep_compute::cuda::Precision;
use halfstep_compute::{Cpu, Device};

use crate::fixture::{Fixture, spec};
use crate::grid::Cells;
use crate::quadratic::{Pair, Quadratic};
use crate::{Activation, GramView, Prepared, RowProblem, Settings, SolveError, Statistics, Workspace};

/// f32 products of some hundred terms in two orders, relative to the largest.
const PRODUCT_ERROR_MAX: f32 = 1e-5;
/// The same in f64.
const EXACT_ERROR_MAX: f64 = 1e-11;

fn problem<'a>(fixture: &'a Fixture, view: GramView<'a>) -> RowProblem<'a> {
    RowProblem {
        w: &fixture.w,
        rows: fixture.rows,
        cols: fixture.cols,
        encodings: &fixture.encodings,
        bias: None,
        output_scale: 1.0,
        activation: Activation::Identity,
        statistics: Statistics::Gram(view),
        layer_key: 0,
        first_row: 0,
    }
}

/// All that is known of the statistics, products with the weights, energies, exact differences of two roundings.
struct Found {
    squares: Vec<f32>,
    gap_norm: Vec<f32>,
    gap_is_zero: bool,
    linear: Vec<f32>,
    /// `k` and `w G w'` of each row, summed.
    sums: [f64; 2],
    differences: Vec<f64>,
}

fn find<D: Device>(device: &D, fixture: &Fixture, view: GramView<'_>) -> Found {
    let (problem, settings) = (problem(fixture, view), Settings::default());
    let prepared = Prepared::new(device, &problem.statistics, fixture.cols, &settings).unwrap();
    let cells = Cells::new(&fixture.w, &fixture.encodings, &prepared.dead);
    let mut workspace = Workspace::new();
    let arrays = workspace.arrays(device, fixture.rows, fixture.cols).unwrap();
    let quadratic = Quadratic::new(device, &problem, &prepared, view, &cells, &settings, arrays).unwrap();
    let mut linear = vec![0.0; fixture.rows * fixture.cols];
    device.download(&arrays.linear, &mut linear).unwrap();
    let nearest = &cells.nearest_up;
    let other: Vec<f32> =
        nearest.iter().enumerate().map(|(at, up)| if at % 5 == 0 { 1.0 - up } else { *up }).collect();
    let pairs: Vec<Pair<'_>> =
        [2, 0, 3].map(|row| Pair { row, first: nearest, second: &other }).into_iter().collect();
    let differences = quadratic.differences(device, &cells, &pairs, arrays).unwrap();
    let mut gap_norm = vec![0.0; fixture.cols];
    device.download(&prepared.gap_norm, &mut gap_norm).unwrap();
    Found {
        squares: prepared.squares.clone(),
        gap_norm,
        gap_is_zero: prepared.gap_is_zero,
        linear,
        sums: [(0..4).map(|row| quadratic.full(row, 0.0, 1.0)).sum(), quadratic.signal(1.0)],
        differences,
    }
}

fn assert_near(what: &str, got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance * want.abs().max(1.0), "{what}: {got}, the host has {want}");
}

#[test]
fn a_device_makes_of_statistics_what_the_host_makes_of_them() {
    let Some(cuda) = device::cuda_of(Precision::Tf32) else { return };
    let fixture = Fixture::new(12, 4, 70, 200, spec(4));
    let Fixture { h, c, g, .. } = &fixture;
    let same = h.clone();
    for (c, g) in [(c, Some(g)), (c, None), (h, None), (h, Some(g)), (&same, Some(g)), (&same, Some(&same))] {
        let view = GramView { h, c, g_energy: g.map(Vec::as_slice), count: 200.0 };
        let (want, got) = (find(&Cpu, &fixture, view), find(&cuda, &fixture, view));
        assert_eq!((&got.squares, &got.gap_norm), (&want.squares, &want.gap_norm));
        assert_eq!((got.gap_is_zero, want.gap_is_zero), (c == h, c == h));
        for (at, (got, want)) in got.linear.iter().zip(&want.linear).enumerate() {
            assert!((got - want).abs() < PRODUCT_ERROR_MAX, "linear term {at}: {got}, the host has {want}");
        }
        for (got, want) in got.sums.iter().zip(want.sums) {
            assert_near("constants", *got, want, f64::from(PRODUCT_ERROR_MAX));
        }
        assert!(want.differences.iter().all(|difference| difference.abs() > 0.1), "{:?}", want.differences);
        for (got, want) in got.differences.iter().zip(&want.differences) {
            assert_near("difference", *got, *want, EXACT_ERROR_MAX);
        }
    }
}

#[test]
fn statistics_that_a_device_cannot_use_are_refused_as_on_the_host() {
    let Some(cuda) = device::cuda_of(Precision::Tf32) else { return };
    let fixture = Fixture::new(12, 2, 9, 30, spec(4));
    let settings = Settings::default();
    let refused = |spoil: &dyn Fn(&mut [Vec<f32>; 3], &mut f64)| -> [String; 2] {
        let (mut all, mut count) = ([fixture.h.clone(), fixture.c.clone(), fixture.g.clone()], 30.0);
        spoil(&mut all, &mut count);
        let [h, c, g] = &all;
        let statistics = Statistics::Gram(GramView { h, c, g_energy: Some(g), count });
        let text = |error: Option<SolveError>| error.map_or_else(String::new, |error| error.to_string());
        [
            text(Prepared::new(&Cpu, &statistics, 9, &settings).err()),
            text(Prepared::new(&cuda, &statistics, 9, &settings).err()),
        ]
    };
    for (matrix, name) in ["gram H", "cross gram C", "gram G"].iter().enumerate() {
        let [host, device] = refused(&|all, _| all[matrix][14] = f32::NAN);
        assert_eq!(device, format!("{name}: entry [1, 5] is NaN, expected a finite number"));
        assert_eq!(device, host);
        let [host, device] = refused(&|all, _| all[matrix].truncate(80));
        assert!(device == host && device.starts_with(name), "{device} for {host}");
    }
    for [host, device] in [refused(&|all, _| all[0][20] = -1.0), refused(&|_, count| *count = 0.0)] {
        assert!(!device.is_empty() && device == host, "{device} for {host}");
    }
}
