//! The CUDA device against the CPU, method by method; on machines without one the host pretends to be one.
//!
//! `HALFSTEP_CUDA_LIBRARIES` names folders of CUDA's libraries, as for the binary. Random data comes from seeds that the
//! shape determines. Not here: kernels executed without a device (`cuda_kernels`).

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]
#![expect(clippy::print_stdout, reason = "says why a test was skipped")]

mod device;
// In the same program, since a device that the host pretends to be takes seconds to open.
#[path = "device/learn.rs"]
mod learn;
#[path = "device/moments.rs"]
mod moments;
#[path = "device/rows.rs"]
mod rows;

use device::cuda;
use halfstep_compute::cuda::{Cuda, CudaBuffer};
use halfstep_compute::random::Stream;
use halfstep_compute::{
    Activation, Cpu, CpuBuffer, Descent, Device, DeviceError, MatMut, MatRef, PlaneBuffers, Product,
    RefineShape, StepArgs, StepBuffers, StepGradient, cpu,
};

/// f32 sums of `k` terms below 1 in magnitude, in any order.
fn sum_tolerance(k: usize) -> f32 {
    4e-7 * (k as f32 + 4.0).sqrt() * 4.0
}

/// Factors of 11 bits: each product is off by 2^-11 of itself at most, half of that typically.
fn rough_tolerance(k: usize) -> f32 {
    1e-3 * (k as f32).sqrt() + sum_tolerance(k)
}

/// The kernels' and the CPU's step are each within 5e-6 of the exact one, per iteration.
const STEP_TOLERANCE: f32 = 2e-5;
/// Activations are within 1e-6 of the exact ones on both sides, relative to the argument.
const ACTIVATION_TOLERANCE: f32 = 4e-6;

fn uniform(stream: &mut Stream, len: usize) -> Vec<f32> {
    (0..len).map(|_| stream.unit_f32() * 2.0 - 1.0).collect()
}

/// Both devices' arrays with the same contents.
struct Pair {
    cpu: CpuBuffer,
    gpu: CudaBuffer,
}

impl Pair {
    fn new(gpu: &Cuda, host: &[f32]) -> Self {
        Self { cpu: Cpu.upload(host).unwrap(), gpu: gpu.upload(host).unwrap() }
    }

    /// What the device holds, whole.
    fn downloaded(&self, gpu: &Cuda) -> Vec<f32> {
        let mut host = vec![0.0; self.cpu.len()];
        gpu.download(&self.gpu, &mut host).unwrap();
        host
    }

    fn assert_close(&self, gpu: &Cuda, tolerance: f32, what: &str) {
        for (at, (got, want)) in self.downloaded(gpu).iter().zip(self.cpu.iter()).enumerate() {
            let error = (got - want).abs();
            assert!(
                error <= tolerance * want.abs().max(1.0),
                "{what} at {at}: {got}, the CPU has {want}: error {error:e}, allowed {tolerance:e}"
            );
        }
    }

    fn assert_equal(&self, gpu: &Cuda, what: &str) {
        let got = self.downloaded(gpu);
        let at = got.iter().zip(self.cpu.iter()).position(|(got, want)| got.to_bits() != want.to_bits());
        assert!(
            at.is_none(),
            "{what} at {at:?}: {:?}, the CPU has {:?}",
            at.map(|i| got[i]),
            at.map(|i| self.cpu[i])
        );
    }
}

#[test]
fn buffers_round_trip_and_refuse_as_the_cpu_does() {
    let Some(gpu) = cuda() else { return };
    let mut buffer = gpu.zeros(3).unwrap();
    gpu.write(&[1.0, 2.0], &mut buffer).unwrap();
    let mut host = [9.0; 3];
    gpu.download(&buffer, &mut host).unwrap();
    assert_eq!(host, [1.0, 2.0, 0.0]);
    let refused = |error: DeviceError| error.to_string();
    assert_eq!(
        refused(gpu.write(&[0.0; 4], &mut buffer).unwrap_err()),
        "write: buffer too short, expected at least 4 elements, actual 3"
    );
    assert!(gpu.download(&buffer, &mut [0.0; 4]).is_err());
    let mut empty = gpu.zeros(0).unwrap();
    gpu.write(&[], &mut empty).unwrap();
    gpu.download(&empty, &mut []).unwrap();
    assert!(gpu.write(&[1.0], &mut empty).is_err());
    let (free, total) = gpu.memory().unwrap();
    assert!(free > 0 && free <= total);
}

#[test]
fn too_much_memory_is_refused_as_such_and_the_device_lives_on() {
    let Some(gpu) = cuda() else { return };
    for len in [usize::MAX / 2, 1 << 42] {
        let Err(error) = gpu.zeros(len) else { panic!("{len} elements fit") };
        assert!(matches!(error, DeviceError::OutOfMemory { asked, .. } if asked > 1 << 40), "{error}");
    }
    assert!(gpu.zeros(1000).is_ok());
}

#[test]
fn buffers_of_other_lanes_are_refused() {
    let Some(gpu) = cuda() else { return };
    let other = gpu.lane().unwrap();
    let mut foreign = other.zeros(4).unwrap();
    let error = gpu.download(&foreign, &mut [0.0]).unwrap_err().to_string();
    assert!(error.contains("download: the buffer is lane"), "{error}");
    assert!(gpu.write(&[1.0], &mut foreign).is_err());
    other.write(&[1.0, 2.0, 3.0, 4.0], &mut foreign).unwrap();
    other.share(&mut foreign).unwrap();
    let mut host = [0.0; 4];
    gpu.download(&foreign, &mut host).unwrap();
    assert_eq!(host, [1.0, 2.0, 3.0, 4.0], "shared arrays are read from any lane");
    for lane in [&gpu, &other] {
        let error = lane.write(&[1.0], &mut foreign).unwrap_err().to_string();
        assert!(error.ends_with("the buffer is shared, expected one that may be written"), "{error}");
    }
}

fn check_product(gpu: &Cuda, (m, n, k): (usize, usize, usize), transposed: [bool; 2], pad: usize, beta: f32) {
    let mut stream = Stream::new(1, (m * 4096 + n) as u64, k as u32);
    let a_stride = if transposed[0] { m } else { k } + pad;
    let b_stride = if transposed[1] { k } else { n } + pad;
    let a = Pair::new(gpu, &uniform(&mut stream, 1 + m.max(k) * a_stride));
    let b = Pair::new(gpu, &uniform(&mut stream, 1 + n.max(k) * b_stride));
    let before = uniform(&mut stream, 1 + m * (n + pad));
    let product = Product { alpha: -0.5, beta, ..Product::new(m, n, k) };
    for rough in [false, true] {
        let mut out = Pair::new(gpu, &before);
        fn factor<B>(buffer: &B, stride: usize, transposed: bool) -> MatRef<'_, B> {
            MatRef { buffer, offset: 1, stride, transposed }
        }
        let out_at = MatMut { buffer: &mut out.cpu, offset: 1, stride: n + pad };
        let (left, right) =
            (factor(&a.cpu, a_stride, transposed[0]), factor(&b.cpu, b_stride, transposed[1]));
        Cpu.matmul(product, left, right, out_at).unwrap();
        let out_at = MatMut { buffer: &mut out.gpu, offset: 1, stride: n + pad };
        let (left, right) =
            (factor(&a.gpu, a_stride, transposed[0]), factor(&b.gpu, b_stride, transposed[1]));
        let tolerance = match rough {
            false => gpu.matmul(product, left, right, out_at).map(|()| sum_tolerance(k)),
            true => gpu.matmul_rough(product, left, right, out_at).map(|()| rough_tolerance(k)),
        };
        let what = format!("[{m}, {k}] x [{k}, {n}], {transposed:?}, pad {pad}, beta {beta}, rough {rough}");
        out.assert_close(gpu, tolerance.unwrap(), &what);
    }
}

#[test]
fn products_agree_with_the_cpu_at_awkward_shapes() {
    let Some(gpu) = cuda() else { return };
    for shape in [
        (1, 1, 1),
        (1, 7, 13),
        (7, 1, 13),
        (5, 17, 2),
        (33, 31, 129),
        (128, 128, 128),
        (3, 5, 511),
        (127, 65, 1030),
    ] {
        for transposed in [[false, false], [true, false], [false, true], [true, true]] {
            check_product(&gpu, shape, transposed, 0, 0.0);
            check_product(&gpu, shape, transposed, 3, 2.0);
        }
    }
}

#[test]
fn depth_zero_scales_and_empty_results_are_left_alone() {
    let Some(gpu) = cuda() else { return };
    for beta in [0.0, 0.5, 1.0] {
        check_product(&gpu, (3, 4, 0), [false, false], 1, beta);
    }
    check_product(&gpu, (0, 4, 3), [false, false], 1, 1.0);
    check_product(&gpu, (3, 0, 3), [false, false], 1, 1.0);
    let mut out = gpu.upload(&[f32::NAN; 4]).unwrap();
    let factor = gpu.upload(&[1.0; 4]).unwrap();
    for k in [0, 2] {
        let (a, b) = (MatRef::new(&factor, 2), MatRef::new(&factor, 2));
        gpu.matmul(Product::new(2, 2, k), a, b, MatMut::new(&mut out, 2)).unwrap();
        let mut host = [9.0; 4];
        gpu.download(&out, &mut host).unwrap();
        assert_eq!(host, [k as f32; 4], "with beta 0 the result is not read");
    }
}

#[test]
fn operands_that_do_not_fit_are_named_as_on_the_cpu() {
    let Some(gpu) = cuda() else { return };
    let (short, fine) = (gpu.zeros(3).unwrap(), gpu.zeros(4).unwrap());
    let call = |a: MatRef<'_, CudaBuffer>, b: MatRef<'_, CudaBuffer>, m: usize, stride: usize| {
        let mut out = gpu.zeros(4).unwrap();
        gpu.matmul(Product::new(m, 2, 2), a, b, MatMut::new(&mut out, stride)).unwrap_err().to_string()
    };
    let two = |buffer| MatRef::new(buffer, 2);
    assert!(
        call(two(&short), two(&fine), 2, 2).starts_with("matmul a: buffer too short, expected at least 4")
    );
    assert!(
        call(two(&fine), two(&fine).at(1), 2, 2)
            .starts_with("matmul b: buffer too short, expected at least 5")
    );
    assert!(call(two(&fine), two(&fine), 2, 1).starts_with("matmul out: row stride 1"));
    assert!(call(MatRef::new(&fine, usize::MAX), two(&fine), 2, 2).starts_with("matmul a: buffer too short"));
    assert!(call(two(&fine), two(&fine), usize::MAX, 2).starts_with("matmul a: buffer too short"));
}

#[test]
fn gram_matrices_agree_accumulate_and_are_symmetric() {
    let Some(gpu) = cuda() else { return };
    for (n, k) in [(1, 1), (5, 3), (40, 31), (33, 32), (200, 65), (513, 130), (0, 7)] {
        let mut stream = Stream::new(2, n as u64, k as u32);
        let x = Pair::new(&gpu, &uniform(&mut stream, n * k));
        let mut g = Pair::new(&gpu, &vec![0.0; k * k]);
        for _ in 0..2 {
            Cpu.gram(&x.cpu, n, k, &mut g.cpu).unwrap();
            gpu.gram(&x.gpu, n, k, &mut g.gpu).unwrap();
        }
        g.assert_close(&gpu, sum_tolerance(2 * n), &format!("gram of [{n}, {k}]"));
        let got = g.downloaded(&gpu);
        assert!((0..k * k).all(|at| got[at].to_bits() == got[at % k * k + at / k].to_bits()), "[{n}, {k}]");
    }
    let (x, mut g) = (gpu.zeros(4).unwrap(), gpu.zeros(4).unwrap());
    assert!(gpu.gram(&x, 2, 3, &mut g).is_err() && gpu.gram(&x, usize::MAX, 2, &mut g).is_err());
}

/// The arrays of a step, on both devices.
struct Steps {
    len: usize,
    product: Pair,
    target: Pair,
    lo: Pair,
    delta: Pair,
    v: Pair,
    m1: Pair,
    m2: Pair,
    soft: Pair,
}

impl Steps {
    fn new(gpu: &Cuda, len: usize) -> Self {
        let mut stream = Stream::new(3, len as u64, 0);
        let mut random =
            |scale: f32| -> Vec<f32> { uniform(&mut stream, len).iter().map(|x| x * scale).collect() };
        let (product, target, lo) = (random(3.0), random(3.0), random(1.0));
        // A tenth of the weights is fixed.
        let delta: Vec<f32> = (0..len).map(|i| if i % 10 == 3 { 0.0 } else { 0.5 }).collect();
        let v = random(4.0);
        let zeros = vec![0.0; len];
        let pair = |host: &[f32]| Pair::new(gpu, host);
        Self {
            len,
            product: pair(&product),
            target: pair(&target),
            lo: pair(&lo),
            delta: pair(&delta),
            v: pair(&v),
            m1: pair(&zeros),
            m2: pair(&zeros),
            soft: pair(&vec![f32::NAN; len]),
        }
    }

    fn run(&mut self, gpu: &Cuda, args: &StepArgs, difference: bool) {
        macro_rules! on {
            ($device:expr, $side:ident) => {
                $device
                    .adaround_step(
                        args,
                        StepBuffers {
                            len: self.len,
                            gradient: match difference {
                                true => StepGradient::Difference {
                                    product: &self.product.$side,
                                    target: &self.target.$side,
                                },
                                false => StepGradient::Given { gradient: &self.product.$side },
                            },
                            lo: &self.lo.$side,
                            delta: &self.delta.$side,
                            v: &mut self.v.$side,
                            m1: &mut self.m1.$side,
                            m2: &mut self.m2.$side,
                            soft: &mut self.soft.$side,
                        },
                    )
                    .unwrap()
            };
        }
        on!(Cpu, cpu);
        on!(gpu, gpu);
    }
}

#[test]
fn steps_agree_over_many_iterations_with_and_without_the_rounding_loss() {
    let Some(gpu) = cuda() else { return };
    for len in [1, 3, 255, 256, 257, 10_007] {
        for (difference, lambda, beta) in
            [(true, 0.0, 2.0), (true, 3.0, 20.0), (false, 1.5, 2.0), (false, 0.0, 2.0)]
        {
            let mut steps = Steps::new(&gpu, len);
            let args =
                StepArgs { lambda, beta, grad_scale: 2.0, beta1: 0.8, beta2: 0.9, ..StepArgs::adam(0.1) };
            for t in 1..=10 {
                steps.run(&gpu, &args.at_iteration(t), difference);
            }
            let what = format!("{len} weights, difference {difference}, lambda {lambda}");
            // Errors of the state feed the next iteration.
            steps.v.assert_close(&gpu, 20.0 * STEP_TOLERANCE, &format!("v of {what}"));
            steps.soft.assert_close(&gpu, 20.0 * STEP_TOLERANCE, &format!("soft of {what}"));
        }
    }
    let mut steps = Steps::new(&gpu, 10);
    steps.len = 11;
    let error = gpu
        .adaround_step(
            &StepArgs::adam(0.1),
            StepBuffers {
                len: 11,
                gradient: StepGradient::Given { gradient: &steps.product.gpu },
                lo: &steps.lo.gpu,
                delta: &steps.delta.gpu,
                v: &mut steps.v.gpu,
                m1: &mut steps.m1.gpu,
                m2: &mut steps.m2.gpu,
                soft: &mut steps.soft.gpu,
            },
        )
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "step gradient: buffer too short, expected at least 11 elements, actual 10"
    );
}

#[test]
fn refinement_flips_exactly_what_the_cpu_flips() {
    let Some(gpu) = cuda() else { return };
    for (rows, cols) in [(1, 1), (1, 13), (15, 40), (16, 128), (17, 131), (300, 257)] {
        let mut stream = Stream::new(4, rows as u64, cols as u32);
        // Small integers: every sum is exact on every device.
        let mut integers = |len: usize, limit: u32, shift: f32| -> Vec<f32> {
            (0..len).map(|_| stream.index(limit) as f32 - shift).collect()
        };
        let x = Cpu.upload(&integers((cols + 3) * cols, 7, 3.0)).unwrap();
        let mut h = Cpu.zeros(cols * cols).unwrap();
        Cpu.gram(&x, cols + 3, cols, &mut h).unwrap();
        let h = Pair::new(&gpu, &h);
        let residual = Pair::new(&gpu, &integers(rows * cols, 400, 200.0));
        let delta: Vec<f32> = integers(rows * cols, 10, 0.0).iter().map(|x| f32::from(*x != 0.0)).collect();
        let delta = Pair::new(&gpu, &delta);
        let start = integers(rows * cols, 2, 0.0);
        for block in [0..cols.min(128), cols / 2..cols.min(cols / 2 + 128), cols / 3..cols / 3 + 1, 0..0] {
            let mut up = Pair::new(&gpu, &start);
            let mut flips = Pair::new(&gpu, &vec![f32::NAN; rows * block.len()]);
            let shape = RefineShape { rows, cols, block: block.clone() };
            let want = Cpu
                .refine_block(&shape, &h.cpu, &residual.cpu, &delta.cpu, &mut up.cpu, &mut flips.cpu)
                .unwrap();
            let got = gpu
                .refine_block(&shape, &h.gpu, &residual.gpu, &delta.gpu, &mut up.gpu, &mut flips.gpu)
                .unwrap();
            let what = format!("[{rows}, {cols}], columns {block:?}");
            assert_eq!(got, want, "{what}");
            up.assert_equal(&gpu, &format!("choices of {what}"));
            // A flip of 0 may have either sign.
            flips.assert_close(&gpu, 0.0, &format!("flips of {what}"));
        }
        let outside = RefineShape { rows, cols, block: cols..cols + 1 };
        let (mut up, mut flips) = (gpu.zeros(rows * cols).unwrap(), gpu.zeros(rows * 128).unwrap());
        let error =
            gpu.refine_block(&outside, &h.gpu, &residual.gpu, &delta.gpu, &mut up, &mut flips).unwrap_err();
        assert!(error.to_string().starts_with("refine block: index"), "{error}");
    }
}

#[test]
fn whole_sweeps_and_differences_are_those_of_the_cpu() {
    let Some(gpu) = cuda() else { return };
    for (rows, cols) in [(1, 1), (3, 130), (33, 257), (200, 128)] {
        let mut stream = Stream::new(8, rows as u64, cols as u32);
        // Small integers: every sum is exact on every device.
        let mut integers = |len: usize, limit: u32, shift: f32| -> Vec<f32> {
            (0..len).map(|_| stream.index(limit) as f32 - shift).collect()
        };
        let x = Cpu.upload(&integers((cols + 3) * cols, 3, 1.0)).unwrap();
        let mut h = Cpu.zeros(cols * cols).unwrap();
        Cpu.gram(&x, cols + 3, cols, &mut h).unwrap();
        let h = Pair::new(&gpu, &h);
        let mut residual = Pair::new(&gpu, &integers(rows * cols, 400, 200.0));
        let target = Pair::new(&gpu, &integers(rows * cols, 50, 25.0));
        let delta = Pair::new(&gpu, &vec![1.0; rows * cols]);
        let mut up = Pair::new(&gpu, &integers(rows * cols, 2, 0.0));
        let mut flips = Pair::new(&gpu, &vec![0.0; rows * cols.min(128)]);
        Cpu.subtract(rows * cols, &mut residual.cpu, &target.cpu).unwrap();
        gpu.subtract(rows * cols, &mut residual.gpu, &target.gpu).unwrap();
        for sweep in 0..3 {
            let what = format!("[{rows}, {cols}], sweep {sweep}");
            let Pair { cpu: residual_cpu, gpu: residual_gpu } = &mut residual;
            let want =
                Cpu.refine_sweep(rows, cols, &h.cpu, residual_cpu, &delta.cpu, &mut up.cpu, &mut flips.cpu);
            let got =
                gpu.refine_sweep(rows, cols, &h.gpu, residual_gpu, &delta.gpu, &mut up.gpu, &mut flips.gpu);
            assert_eq!(got.unwrap(), want.unwrap(), "{what}");
            up.assert_equal(&gpu, &format!("choices of {what}"));
            // A 0 may have either sign.
            residual.assert_close(&gpu, 0.0, &format!("residual of {what}"));
        }
    }
    let (mut a, b) = (gpu.zeros(2).unwrap(), gpu.zeros(3).unwrap());
    assert!(gpu.subtract(3, &mut a, &b).is_err());
}

#[test]
fn descent_ends_where_the_twin_ends_and_says_whether_it_settled() {
    let Some(gpu) = cuda() else { return };
    for (rows, cols, sweeps) in [(1, 1, 1), (3, 130, 1), (33, 257, 40), (200, 128, 2), (5, 1030, 40)] {
        let mut stream = Stream::new(9, rows as u64, cols as u32);
        let mut integers = |len: usize, limit: u32, shift: f32| -> Vec<f32> {
            (0..len).map(|_| stream.index(limit) as f32 - shift).collect()
        };
        let x = Cpu.upload(&integers((cols + 3) * cols, 3, 1.0)).unwrap();
        let mut h = Cpu.zeros(cols * cols).unwrap();
        Cpu.gram(&x, cols + 3, cols, &mut h).unwrap();
        let h = Pair::new(&gpu, &h);
        let mut residual = Pair::new(&gpu, &integers(rows * cols, 400, 200.0));
        let delta = Pair::new(&gpu, &vec![1.0; rows * cols]);
        let mut up = Pair::new(&gpu, &integers(rows * cols, 2, 0.0));
        let mut flips = gpu.zeros(rows * cols.min(128)).unwrap();
        let want = cpu::refine_rows(sweeps, rows, cols, &h.cpu, &mut residual.cpu, &delta.cpu, &mut up.cpu);
        let got = gpu
            .descend(sweeps, rows, cols, &h.gpu, &mut residual.gpu, &delta.gpu, &mut up.gpu, &mut flips)
            .unwrap();
        let what = format!("[{rows}, {cols}], {sweeps} sweeps");
        let ran = want.iter().map(|(_, ran)| *ran).max().unwrap();
        let flipped = want.iter().map(|(flips, _)| u64::from(*flips)).sum();
        let settled = ran < sweeps || flipped == 0;
        assert_eq!(got, Descent { sweeps: ran, flips: flipped, settled }, "{what}");
        up.assert_equal(&gpu, &format!("choices of {what}"));
        // A 0 may have either sign.
        residual.assert_close(&gpu, 0.0, &format!("residual of {what}"));
    }
}

#[test]
fn gathered_rows_are_the_rows() {
    let Some(gpu) = cuda() else { return };
    for (rows, k, count) in [(1, 1, 1), (10, 3, 17), (50, 128, 32), (20, 513, 5), (7, 1025, 64)] {
        let mut stream = Stream::new(5, rows as u64, k as u32);
        let source = Pair::new(&gpu, &uniform(&mut stream, rows * k));
        let indices: Vec<u32> = (0..count).map(|_| stream.index(rows as u32)).collect();
        let mut out = Pair::new(&gpu, &vec![f32::NAN; count * k]);
        Cpu.gather_rows(&source.cpu, k, &indices, &mut out.cpu).unwrap();
        gpu.gather_rows(&source.gpu, k, &indices, &mut out.gpu).unwrap();
        out.assert_equal(&gpu, &format!("{count} of [{rows}, {k}]"));
        let error = gpu.gather_rows(&source.gpu, k, &[rows as u32], &mut out.gpu).unwrap_err();
        assert!(matches!(error, DeviceError::Index { operand: "gather source", .. }), "{error}");
    }
}

#[test]
fn gathered_columns_are_the_columns() {
    let Some(gpu) = cuda() else { return };
    let (rows, width) = (37, 700);
    let mut stream = Stream::new(31, 0, 0);
    let source = Pair::new(&gpu, &uniform(&mut stream, rows * width));
    let mut out = Pair::new(&gpu, &vec![0.0; rows * width]);
    let order: Vec<u32> = (0..width).map(|_| stream.index(width as u32)).collect();
    gpu.gather_columns(&source.gpu, rows, &order, &mut out.gpu).unwrap();
    Cpu.gather_columns(&source.cpu, rows, &order, &mut out.cpu).unwrap();
    out.assert_equal(&gpu, "columns");
    let error = gpu.gather_columns(&source.gpu, 1, &[1, 2], &mut out.gpu).unwrap_err();
    assert!(error.to_string().contains("out of range"), "{error}");
}

/// `x' x / n + I / 4`: positive definite.
fn positive(stream: &mut Stream, n: usize) -> Vec<f32> {
    let x = Cpu.upload(&uniform(stream, n * n)).unwrap();
    let mut a = Cpu.zeros(n * n).unwrap();
    Cpu.gram(&x, n, n, &mut a).unwrap();
    a.iter_mut().for_each(|value| *value /= n as f32);
    a.iter_mut().step_by(n + 1).for_each(|value| *value += 0.25);
    a.0
}

#[test]
fn blocks_of_factors_and_of_the_nearest_plane_are_those_of_the_cpu() {
    let Some(gpu) = cuda() else { return };
    let (rows, n) = (41, 150);
    for block in [0..64, 64..128, 128..150] {
        let mut stream = Stream::new(32, block.start as u64, 0);
        let a = Pair::new(&gpu, &positive(&mut stream, n));
        let (mut lower, mut inverses) =
            (Pair::new(&gpu, &vec![0.0; n * n]), Pair::new(&gpu, &vec![0.0; n * 64]));
        gpu.factor_block(n, block.clone(), 0.5, &a.gpu, &mut lower.gpu, &mut inverses.gpu).unwrap();
        Cpu.factor_block(n, block.clone(), 0.5, &a.cpu, &mut lower.cpu, &mut inverses.cpu).unwrap();
        lower.assert_close(&gpu, 1e-6, "factor");
        inverses.assert_close(&gpu, 1e-6, "inverse");
        let factor =
            Pair::new(&gpu, &uniform(&mut stream, n * n).iter().map(|v| v + 1.5).collect::<Vec<_>>());
        let [low, delta, offset] = [(); 3].map(|()| Pair::new(&gpu, &uniform(&mut stream, rows * n)));
        let [mut up, mut errors] = [(); 2].map(|()| Pair::new(&gpu, &vec![0.0; rows * n]));
        let buffers = PlaneBuffers { low: &low.gpu, delta: &delta.gpu, offset: &offset.gpu };
        gpu.plane_block(rows, n, block.clone(), &factor.gpu, buffers, &mut up.gpu, &mut errors.gpu).unwrap();
        let buffers = PlaneBuffers { low: &low.cpu, delta: &delta.cpu, offset: &offset.cpu };
        Cpu.plane_block(rows, n, block.clone(), &factor.cpu, buffers, &mut up.cpu, &mut errors.cpu).unwrap();
        up.assert_equal(&gpu, "choices");
        errors.assert_equal(&gpu, "errors");
    }
    let small = Pair::new(&gpu, &[0.0; 9]);
    let (mut lower, mut inverses) = (gpu.zeros(9).unwrap(), gpu.zeros(9).unwrap());
    assert!(
        gpu.factor_block(3, 0..3, 0.0, &small.gpu, &mut lower, &mut inverses).is_err(),
        "inverses are short"
    );
    assert!(gpu.factor_block(3, 0..4, 0.0, &small.gpu, &mut lower, &mut inverses).is_err(), "outside");
}

#[test]
fn residuals_after_activations_agree_for_every_kind() {
    let Some(gpu) = cuda() else { return };
    let all = [
        Activation::Identity,
        Activation::Relu,
        Activation::Clip { min: -1.25, max: 0.5 },
        Activation::LeakyRelu { slope: 0.01 },
        Activation::PRelu { slope: -0.3 },
        Activation::Sigmoid,
        Activation::Tanh,
        Activation::HardSwish,
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
    ];
    for cols in [1, 32, 33, 700] {
        let rows = all.len();
        let mut stream = Stream::new(6, cols as u64, 0);
        // Off the kinks, which lie at multiples of 1/4.
        let z: Vec<f32> =
            (0..rows * cols).map(|_| (stream.index(4000) as f32 - 2000.0 + 0.37) * 0.005).collect();
        let target = Pair::new(&gpu, &uniform(&mut stream, rows * cols));
        let bias = uniform(&mut stream, rows).iter().map(|x| (x * 8.0).round() * 0.5).collect::<Vec<_>>();
        let check = |activations: &[Activation], bias: &[f32]| {
            let mut z = Pair::new(&gpu, &z);
            // Twice, the second time with the table already there.
            for _ in 0..2 {
                z = Pair::new(&gpu, &z.cpu);
                Cpu.activation_residual(activations, bias, rows, cols, &mut z.cpu, &target.cpu).unwrap();
                gpu.activation_residual(activations, bias, rows, cols, &mut z.gpu, &target.gpu).unwrap();
            }
            // (f - t) f' with |x| up to 10.
            z.assert_close(&gpu, 40.0 * ACTIVATION_TOLERANCE, &format!("{activations:?} {cols}"));
        };
        check(&all, &bias);
        check(&all, &[]);
        for one in all {
            check(&[one], &[]);
            check(&[one], &bias);
        }
    }
    let (mut z, target) = (gpu.zeros(4).unwrap(), gpu.zeros(4).unwrap());
    assert!(gpu.activation_residual(&all, &[], 2, 2, &mut z, &target).is_err());
    assert!(gpu.activation_residual(&all[..1], &[0.0], 2, 2, &mut z, &target).is_err());
}

#[test]
fn lanes_at_work_side_by_side_give_equal_bits() {
    let Some(gpu) = cuda() else { return };
    let (m, k) = (96, 384);
    let work = |lane: Cuda| -> Vec<f32> {
        let mut stream = Stream::new(7, 0, 0);
        let h = lane.upload(&uniform(&mut stream, k * k)).unwrap();
        let mut soft = lane.upload(&uniform(&mut stream, m * k)).unwrap();
        let mut product = lane.zeros(m * k).unwrap();
        let (lo, delta) = (lane.zeros(m * k).unwrap(), lane.upload(&vec![0.25; m * k]).unwrap());
        let [mut v, mut m1, mut m2] = [(); 3].map(|()| lane.zeros(m * k).unwrap());
        for t in 1..=50 {
            let (a, b) = (MatRef::new(&soft, k), MatRef::new(&h, k));
            lane.matmul_rough(Product::new(m, k, k), a, b, MatMut::new(&mut product, k)).unwrap();
            let buffers = StepBuffers {
                len: m * k,
                gradient: StepGradient::Given { gradient: &product },
                lo: &lo,
                delta: &delta,
                v: &mut v,
                m1: &mut m1,
                m2: &mut m2,
                soft: &mut soft,
            };
            lane.adaround_step(&StepArgs::adam(0.1).at_iteration(t), buffers).unwrap();
        }
        let mut host = vec![0.0; m * k];
        lane.download(&v, &mut host).unwrap();
        host
    };
    let lanes: Vec<Cuda> = (0..4).map(|_| gpu.lane().unwrap()).collect();
    let results: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let threads: Vec<_> = lanes.into_iter().map(|lane| scope.spawn(|| work(lane))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(results[0].iter().all(|v| v.is_finite()) && results[0].iter().any(|v| *v != 0.0));
    for other in &results[1..] {
        assert!(results[0].iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}
