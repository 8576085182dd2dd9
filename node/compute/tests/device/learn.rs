//! AdaRound's iterations on the device beside the CPU's, where inputs differ by many orders of magnitude.
//!
//! Not here: the kernels one by one (`cuda_solver_kernels`), what is learned (`solver`).

use halfstep_compute::cuda::Cuda;
use halfstep_compute::random::Stream;
use halfstep_compute::{Cpu, Device, LearnBuffers, StepArgs};

use super::device::cuda;
use super::uniform;

const ROWS: usize = 13;
const COLS: usize = 96;

/// A chunk on a grid whose columns' inputs are `2^-20` to `2^20`; errors of different rows differ as much.
struct Chunk {
    h: Vec<f32>,
    low: Vec<f32>,
    delta: Vec<f32>,
    target: Vec<f32>,
    v: Vec<f32>,
    soft: Vec<f32>,
}

fn chunk() -> Chunk {
    let mut stream = Stream::new(31, 0, 0);
    let samples = 2 * COLS;
    let x = uniform(&mut stream, samples * COLS);
    let size = |at: usize, of: usize| 2f32.powi(at as i32 * 40 / of as i32 - 20);
    let mut h = vec![0.0; COLS * COLS];
    halfstep_compute::cpu::matmul_tn(COLS, COLS, samples, 1.0, &x, COLS, &x, COLS, 0.0, &mut h, COLS);
    for (at, value) in h.iter_mut().enumerate() {
        *value *= size(at / COLS, COLS) * size(at % COLS, COLS);
    }
    let of_row = |values: Vec<f32>, by: f32| -> Vec<f32> {
        values.iter().enumerate().map(|(i, value)| (value + by) * size(i / COLS, ROWS)).collect()
    };
    let low = of_row(uniform(&mut stream, ROWS * COLS), -1.0);
    let mut delta = of_row(uniform(&mut stream, ROWS * COLS), 1.0);
    delta.iter_mut().step_by(7).for_each(|delta| *delta = 0.0);
    let v = vec![0.0; ROWS * COLS];
    // h(0) is one half.
    let soft: Vec<f32> = low.iter().zip(&delta).map(|(low, delta)| low + 0.5 * delta).collect();
    let target = uniform(&mut stream, ROWS * COLS);
    Chunk { h, low, delta, target, v, soft }
}

/// What a chunk learns with.
struct Arrays<B> {
    fixed: [B; 3],
    moving: [B; 5],
}

impl<B> Arrays<B> {
    fn buffers(&mut self) -> LearnBuffers<'_, B> {
        let ([lo, delta, target], [v, m1, m2, soft, product]) = (&self.fixed, &mut self.moving);
        LearnBuffers { lo, delta, target, v, m1, m2, soft, product }
    }
}

/// Adam's first moments and the rounding variables after so many iterations.
fn learned<D: Device>(device: &D, chunk: &Chunk, iterations: u32) -> [Vec<f32>; 2] {
    let up = |values: &[f32]| device.upload(values).unwrap();
    let zeros = || device.zeros(ROWS * COLS).unwrap();
    let diagonal: Vec<f32> = chunk.h.iter().step_by(COLS + 1).copied().collect();
    let h = up(&chunk.h);
    let steering = device.steering(COLS, &h, &diagonal).unwrap();
    let mut arrays = Arrays {
        fixed: [up(&chunk.low), up(&chunk.delta), up(&chunk.target)],
        moving: [up(&chunk.v), zeros(), zeros(), up(&chunk.soft), zeros()],
    };
    let args = StepArgs { grad_scale: 2.0, eps: 1e-30, ..StepArgs::adam(0.01) };
    let mut steps = (1..=iterations).map(|t| args.at_iteration(t));
    device.learn((ROWS, COLS), &h, steering.as_ref(), arrays.buffers(), &mut steps).unwrap();
    let LearnBuffers { v, m1, .. } = arrays.buffers();
    [m1, v].map(|buffer| {
        let mut host = vec![0.0; ROWS * COLS];
        device.download(buffer, &mut host).unwrap();
        host
    })
}

#[test]
fn gradients_in_eleven_bits_lose_no_small_input_and_no_small_row() {
    let Some(gpu) = cuda() else { return };
    let chunk = chunk();
    let ([got, _], [want, _]) = (learned(&gpu, &chunk, 1), learned(&Cpu, &chunk, 1));
    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
        let (row, col) = (at / COLS, at % COLS);
        let product: f32 =
            (0..COLS).map(|i| (chunk.soft[row * COLS + i] * chunk.h[i * COLS + col]).abs()).sum();
        // The moment is a tenth of the gradient `2 (e H - target) delta h'(0)`, with h'(0) = 0.3; both factors are rounded.
        let by = 0.1 * 2.0 * chunk.delta[at] * 0.3;
        let tolerance = by * (1.1e-3 * product + 1e-5 * chunk.target[at].abs());
        assert!((got - want).abs() <= tolerance, "[{row}, {col}]: {got} for {want}, {tolerance}");
    }
}

#[test]
fn many_iterations_go_where_the_cpus_go_and_all_lanes_take_the_same_bits() {
    let Some(gpu) = cuda() else { return };
    let chunk = chunk();
    let lanes: Vec<Cuda> = (0..3).map(|_| gpu.lane().unwrap()).collect();
    let all: Vec<[Vec<f32>; 2]> = std::thread::scope(|scope| {
        let threads: Vec<_> = lanes.iter().map(|lane| scope.spawn(|| learned(lane, &chunk, 60))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert!(all.iter().all(|one| bits(&one[1]) == bits(&all[0][1])));
    let [_, want] = learned(&Cpu, &chunk, 60);
    let off: f32 = all[0][1].iter().zip(&want).map(|(got, want)| (got - want).abs()).sum();
    let moved: f32 = want.iter().map(|value| value.abs()).sum();
    assert!(moved > 0.0 && off <= 0.02 * moved, "off by {off} of {moved}");
}

#[test]
fn what_was_made_of_another_h_is_refused() {
    let Some(gpu) = cuda() else { return };
    let h = gpu.zeros(64).unwrap();
    let steering = gpu.steering(8, &h, &[1.0; 8]).unwrap();
    let zeros = || gpu.zeros(16).unwrap();
    let mut arrays = Arrays { fixed: [(); 3].map(|()| zeros()), moving: [(); 5].map(|()| zeros()) };
    let mut none = std::iter::empty();
    let refused = gpu.learn((4, 4), &h, steering.as_ref(), arrays.buffers(), &mut none).unwrap_err();
    assert_eq!(refused.to_string(), "learn h: row stride 8 is smaller than the row of 4 elements");
}
