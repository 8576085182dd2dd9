//! What a CUDA device makes of second moments against the CPU; where there is none, the host pretends to be one.
//!
//! Not here: the kernels one by one (`cuda_moments_kernels`).

use super::device::cuda;
use halfstep_compute::cuda::Cuda;
use halfstep_compute::random::Stream;
use halfstep_compute::{Cpu, CpuBuffer, Device, Moments, cpu};

/// Sums of f64 of tiles in another order.
const EXACT_ERROR_MAX: f64 = 1e-12;
/// f32 products of `k` terms below 1 in magnitude, in any order, then exact sums of products with levels.
const PRODUCT_ERROR_MAX: f64 = 2e-6;

struct Problem {
    w: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    /// Symmetric.
    h: Vec<f32>,
    c: Vec<f32>,
    diagonal: Vec<f32>,
}

impl Problem {
    fn new(rows: usize, cols: usize) -> Self {
        let mut stream = Stream::new(6, rows as u64, cols as u32);
        let mut draw = |len: usize| -> Vec<f32> { (0..len).map(|_| stream.unit_f32() - 0.5).collect() };
        let [w, first, second] = [(); 3].map(|()| draw(rows * cols));
        let [mut h, c] = [(); 2].map(|()| draw(cols * cols));
        cpu::mirror_lower(&mut h, cols);
        Self { w, first, second, h, c, diagonal: draw(cols) }
    }
}

/// The same question to both.
fn ask<T>(on: (&Cuda, &Problem), question: impl Question<T>) -> (T, T) {
    let (device, problem) = on;
    (question.put(&Cpu, problem), question.put(device, problem))
}

trait Question<T> {
    fn put<D: Device>(&self, device: &D, problem: &Problem) -> T;
}

fn upload<D: Device>(device: &D, values: &[f32]) -> D::Buffer {
    device.upload(values).unwrap()
}

/// Rows, columns, with C or without.
struct Exact(usize, usize, bool);

impl Question<Vec<f64>> for Exact {
    fn put<D: Device>(&self, device: &D, p: &Problem) -> Vec<f64> {
        let Self(rows, cols, gap) = *self;
        let [w, first, second, h, c, diagonal] =
            [&p.w, &p.first, &p.second, &p.h, &p.c, &p.diagonal].map(|values| upload(device, values));
        let h = Moments { matrix: &h, diagonal: Some(&diagonal) };
        let gap = gap.then_some((&w, &c));
        device.exact_differences(rows, cols, (&first, &second), h, gap).unwrap()
    }
}

#[test]
fn comparisons_are_exact_over_several_tiles() {
    let Some(gpu) = cuda() else { return };
    for (rows, cols) in [(1, 1), (3, 37), (5, 1023), (2, 1025)] {
        let problem = Problem::new(rows, cols);
        for gap in [true, false] {
            let (want, got) = ask((&gpu, &problem), Exact(rows, cols, gap));
            for (row, (got, want)) in got.iter().zip(&want).enumerate() {
                let error = (got - want).abs() / cols as f64;
                assert!(error < EXACT_ERROR_MAX, "[{rows}, {cols}] gap {gap}, row {row}: {got} for {want}");
            }
        }
    }
    // More rows than a tile has.
    let problem = Problem::new(1030, 3);
    let (want, got) = ask((&gpu, &problem), Exact(1030, 3, true));
    assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() < EXACT_ERROR_MAX));
}

/// Rows, columns, what is subtracted.
struct Products(usize, usize, Option<()>);

impl Question<Vec<f32>> for Products {
    fn put<D: Device>(&self, device: &D, p: &Problem) -> Vec<f32> {
        let Self(rows, cols, less) = *self;
        let [w, h, c, diagonal] = [&p.w, &p.h, &p.c, &p.diagonal].map(|values| upload(device, values));
        let mut out = device.upload(&vec![f32::NAN; rows * cols]).unwrap();
        let plus = Moments { matrix: &h, diagonal: Some(&diagonal) };
        device.multiply_moments(rows, cols, &w, plus, less.map(|()| &c), &mut out).unwrap();
        let mut host = vec![0.0; rows * cols];
        device.download(&out, &mut host).unwrap();
        host
    }
}

#[test]
fn products_with_differences_are_the_cpus() {
    let Some(gpu) = cuda() else { return };
    for (rows, cols) in [(1, 1), (3, 37), (7, 300)] {
        let problem = Problem::new(rows, cols);
        for less in [None, Some(())] {
            let (want, got) = ask((&gpu, &problem), Products(rows, cols, less));
            for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                let error = f64::from((got - want).abs());
                assert!(error < PRODUCT_ERROR_MAX * (cols as f64).sqrt(), "{at}: {got} for {want}");
            }
        }
    }
}

/// Rows, columns, columns of a group.
struct Normal(usize, usize, usize);

impl Question<Vec<f64>> for Normal {
    fn put<D: Device>(&self, device: &D, p: &Problem) -> Vec<f64> {
        let Self(rows, cols, width) = *self;
        let (levels, h) = (upload(device, &p.w), upload(device, &p.h));
        let mut scratch = device.zeros(rows * cols).unwrap();
        device.normal_equations(rows, cols, width, &levels, &h, &mut scratch).unwrap()
    }
}

#[test]
fn normal_equations_are_the_cpus_also_where_the_last_group_is_short() {
    let Some(gpu) = cuda() else { return };
    for (rows, cols, width) in
        [(1usize, 1usize, 1usize), (3, 37, 8), (5, 128, 32), (4, 130, 130), (2, 65, 500)]
    {
        let problem = Problem::new(rows, cols);
        let (want, got) = ask((&gpu, &problem), Normal(rows, cols, width));
        assert_eq!((got.len(), want.len()), (want.len(), rows * cols.div_ceil(width).pow(2)));
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!((got - want).abs() < PRODUCT_ERROR_MAX * cols as f64, "{at}: {got} for {want}");
        }
    }
}

#[test]
fn what_a_solve_must_know_of_statistics_is_found_on_the_device() {
    let Some(gpu) = cuda() else { return };
    for cols in [1, 5, 130] {
        let Problem { h, c, diagonal, .. } = Problem::new(1, cols);
        let [on_h, on_c, on_diagonal] = [&h, &c, &diagonal].map(|values| upload(&gpu, values));
        assert_eq!(gpu.column_gaps(cols, &on_h, &on_c).unwrap(), cpu::column_gaps(cols, &h, &c));
        assert_eq!(gpu.column_gaps(cols, &on_h, &on_h).unwrap(), (vec![0.0; cols], false));
        let (mut got, mut want) = (upload(&gpu, &h), CpuBuffer(h.clone()));
        gpu.set_diagonal(cols, &on_diagonal, &mut got).unwrap();
        Cpu.set_diagonal(cols, &CpuBuffer(diagonal), &mut want).unwrap();
        let mut host = vec![0.0; cols * cols];
        gpu.download(&got, &mut host).unwrap();
        assert_eq!(host, want.0);
        let len = cols * cols;
        assert!(gpu.all_finite(len, &on_h).unwrap());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = h.clone();
            values[len - 1] = bad;
            assert!(!gpu.all_finite(len, &upload(&gpu, &values)).unwrap(), "{bad}");
            assert!(gpu.all_finite(len - 1, &upload(&gpu, &values)).unwrap(), "{bad} is behind the end");
        }
    }
}

#[test]
fn arrays_that_are_too_short_are_refused_and_empty_ones_are_not() {
    let Some(gpu) = cuda() else { return };
    let (short, mut out) = (gpu.zeros(5).unwrap(), gpu.zeros(6).unwrap());
    let moments = Moments { matrix: &short, diagonal: None };
    let refused = |error: Option<halfstep_compute::DeviceError>| error.unwrap().to_string();
    let error = refused(gpu.exact_differences(2, 3, (&short, &short), moments, None).err());
    assert_eq!(error, "moments: buffer too short, expected at least 9 elements, actual 5");
    let error = refused(gpu.exact_differences(6, 1, (&short, &short), moments, None).err());
    assert_eq!(error, "difference first: buffer too short, expected at least 6 elements, actual 5");
    let minus = Some(&short);
    assert!(gpu.multiply_moments(2, 3, &short, moments, minus, &mut out).is_err());
    assert!(gpu.normal_equations(2, 3, 1, &short, &short, &mut out).is_err());
    assert!(gpu.normal_equations(2, 2, 1, &short, &short, &mut gpu.zeros(3).unwrap()).is_err());
    assert!(gpu.column_gaps(3, &short, &short).is_err());
    assert!(gpu.set_diagonal(3, &short, &mut out).is_err());
    assert!(gpu.all_finite(6, &short).is_err());
    assert!(gpu.exact_differences(2, 0, (&short, &short), moments, None).unwrap().is_empty());
    assert!(gpu.normal_equations(0, 2, 1, &short, &short, &mut out).unwrap().is_empty());
    assert_eq!(gpu.column_gaps(0, &short, &short).unwrap(), (vec![], false));
}
