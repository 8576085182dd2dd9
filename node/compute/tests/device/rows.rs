//! Rows that are scaled, copied and summed, and grids that are searched for, on the device: refusals, and what is left alone.
//!
//! Not here: the kernels one by one (`cuda_solver_kernels`, `cuda_moments_kernels`).

use super::device::cuda;
use super::uniform;
use halfstep_compute::cuda::GridSearch;
use halfstep_compute::random::Stream;
use halfstep_compute::{Cpu, Device};
use halfstep_quant::{Granularity, GridSpec, MseGrids, RangeEstimator, Scheme, estimate};

const SEARCH: GridSearch = GridSearch { qmin: -8, qmax: 7, symmetric: true, width: 2 };

#[test]
fn rows_are_those_of_the_cpu() {
    let Some(gpu) = cuda() else { return };
    let values: Vec<f32> = (0..12).map(|i| i as f32 - 5.5).collect();
    let (source, mut out) = (gpu.upload(&values).unwrap(), gpu.upload(&[7.0; 12]).unwrap());
    let (on_cpu, mut want) = (Cpu.upload(&values).unwrap(), Cpu.upload(&[7.0; 12]).unwrap());
    gpu.scale_rows(4, &[0.1, -3.0], &source, &mut out).unwrap();
    gpu.copy_rows(4, &[2, 0], &source, &mut out).unwrap();
    gpu.clear(3, &mut out).unwrap();
    Cpu.scale_rows(4, &[0.1, -3.0], &on_cpu, &mut want).unwrap();
    Cpu.copy_rows(4, &[2, 0], &on_cpu, &mut want).unwrap();
    Cpu.clear(3, &mut want).unwrap();
    let mut got = [0.0; 12];
    gpu.download(&out, &mut got).unwrap();
    assert_eq!(got, want[..]);
    // Halves are exact here in any order.
    let dots = gpu.run_dots(3, 4, 3, &source, &source).unwrap();
    assert_eq!(dots, Cpu.run_dots(3, 4, 3, &on_cpu, &on_cpu).unwrap());
    assert_eq!(dots[..2], [5.5f64 * 5.5 + 4.5 * 4.5 + 3.5 * 3.5, 2.5 * 2.5]);
}

#[test]
fn nothing_is_nothing() {
    let Some(gpu) = cuda() else { return };
    let (source, mut out) = (gpu.zeros(4).unwrap(), gpu.zeros(4).unwrap());
    gpu.clear(0, &mut out).unwrap();
    gpu.scale_rows(4, &[], &source, &mut out).unwrap();
    gpu.copy_rows(4, &[], &source, &mut out).unwrap();
    assert!(gpu.run_dots(0, 4, 2, &source, &source).unwrap().is_empty());
    assert!(gpu.run_dots(4, 0, 2, &source, &source).unwrap().is_empty());
    assert_eq!(gpu.search_grids((0, 4), SEARCH, &[], &[1.0; 4]).unwrap(), (vec![], vec![]));
}

#[test]
fn what_does_not_fit_is_refused_as_on_the_cpu() {
    let Some(gpu) = cuda() else { return };
    let (source, mut out) = (gpu.zeros(6).unwrap(), gpu.zeros(4).unwrap());
    let (on_cpu, mut cpu_out) = (Cpu.zeros(6).unwrap(), Cpu.zeros(4).unwrap());
    let text = |result: Result<(), halfstep_compute::DeviceError>| result.unwrap_err().to_string();
    assert_eq!(
        text(gpu.scale_rows(2, &[1.0; 3], &source, &mut out)),
        text(Cpu.scale_rows(2, &[1.0; 3], &on_cpu, &mut cpu_out))
    );
    assert_eq!(
        text(gpu.copy_rows(2, &[2], &source, &mut out)),
        text(Cpu.copy_rows(2, &[2], &on_cpu, &mut cpu_out))
    );
    assert_eq!(text(gpu.clear(5, &mut out)), text(Cpu.clear(5, &mut cpu_out)));
    assert_eq!(
        text(gpu.run_dots(2, 3, 3, &source, &out).map(drop)),
        text(Cpu.run_dots(2, 3, 3, &on_cpu, &cpu_out).map(drop))
    );
    let short = text(gpu.search_grids((2, 2), SEARCH, &[1.0; 3], &[1.0; 2]).map(drop));
    assert_eq!(short, "searched weights: buffer too short, expected at least 4 elements, actual 3");
    assert!(text(gpu.search_grids((1, 2), SEARCH, &[1.0; 2], &[1.0]).map(drop)).starts_with("importance"));
}

#[test]
fn grids_are_those_of_the_cpu_to_the_bit() {
    let Some(gpu) = cuda() else { return };
    let (rows, cols) = (9, 210);
    let mut stream = Stream::new(40, 0, 0);
    let w = uniform(&mut stream, rows * cols);
    let importance: Vec<f32> = uniform(&mut stream, cols).iter().map(|x| x.abs() * 5.0).collect();
    for granularity in [Granularity::PerChannel, Granularity::PerGroup { group_size: 32 }] {
        for (scheme, importance) in [(Scheme::Symmetric, None), (Scheme::Asymmetric, Some(&importance[..]))] {
            let spec = GridSpec { bits: 3, scheme, granularity, range: RangeEstimator::Mse };
            let want = estimate(&spec, &w, rows, cols, importance).unwrap();
            let grids = MseGrids::new(&spec, &w, rows, cols, importance).unwrap().unwrap();
            let ((qmin, qmax), symmetric, width) = (grids.integers(), grids.is_symmetric(), grids.width());
            let search = GridSearch { qmin, qmax, symmetric, width };
            let found = gpu.search_grids((rows, cols), search, &w, grids.importance()).unwrap();
            assert_eq!(grids.encodings(found.0, found.1).unwrap(), want, "{scheme} {granularity}");
        }
    }
}
