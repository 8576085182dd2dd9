//! Each method against the CPU, largest error printed beside what is allowed.
//!
//! The tests of `compute` are stricter about shapes; this is what a machine without a toolchain can run.

use halfstep_compute::random::Stream;
use halfstep_compute::{
    Activation, Cpu, Device, DeviceError, LearnBuffers, MatMut, MatRef, Product, RefineShape, RowTerms,
    StepArgs, StepBuffers, StepGradient,
};

use halfstep_quant::{Granularity, GridSpec, RangeEstimator, Scheme};

use crate::Timed;
use crate::figures::Figures;

const ROWS: usize = 67;
const COLS: usize = 301;

fn uniform(key: u64, len: usize) -> Vec<f32> {
    let mut stream = Stream::new(key, len as u64, 0);
    (0..len).map(|_| stream.unit_f32() * 2.0 - 1.0).collect()
}

fn download<D: Device>(device: &D, buffer: &D::Buffer, len: usize) -> Result<Vec<f32>, DeviceError> {
    let mut host = vec![0.0; len];
    device.download(buffer, &mut host)?;
    Ok(host)
}

fn product<D: Device>(device: &D, rough: bool) -> Result<Vec<f32>, DeviceError> {
    let (a, b) = (device.upload(&uniform(1, ROWS * COLS))?, device.upload(&uniform(2, COLS * COLS))?);
    let mut out = device.zeros(ROWS * COLS)?;
    let (product, left, right) =
        (Product::new(ROWS, COLS, COLS), MatRef::new(&a, COLS), MatRef::new(&b, COLS));
    match rough {
        true => device.matmul_rough(product, left, right, MatMut::new(&mut out, COLS))?,
        false => device.matmul(product, left, right, MatMut::new(&mut out, COLS))?,
    }
    download(device, &out, ROWS * COLS)
}

fn gram<D: Device>(device: &D) -> Result<Vec<f32>, DeviceError> {
    let x = device.upload(&uniform(3, ROWS * COLS))?;
    let mut g = device.zeros(COLS * COLS)?;
    device.gram(&x, ROWS, COLS, &mut g)?;
    download(device, &g, COLS * COLS)
}

fn steps<D: Device>(device: &D) -> Result<Vec<f32>, DeviceError> {
    let len = ROWS * COLS;
    let up = |key: u64| device.upload(&uniform(key, len));
    let (product, target, lo, mut v) = (up(4)?, up(5)?, up(6)?, up(7)?);
    let delta = device.upload(&(0..len).map(|i| if i % 9 == 0 { 0.0 } else { 0.5 }).collect::<Vec<_>>())?;
    let (mut m1, mut m2, mut soft) = (device.zeros(len)?, device.zeros(len)?, device.zeros(len)?);
    let args = StepArgs { lambda: 1.0, beta: 8.0, grad_scale: 2.0, ..StepArgs::adam(0.1) };
    for t in 1..=5 {
        let buffers = StepBuffers {
            len,
            gradient: StepGradient::Difference { product: &product, target: &target },
            lo: &lo,
            delta: &delta,
            v: &mut v,
            m1: &mut m1,
            m2: &mut m2,
            soft: &mut soft,
        };
        device.adaround_step(&args.at_iteration(t), buffers)?;
    }
    Ok([download(device, &v, len)?, download(device, &soft, len)?].concat())
}

/// Iterations as a solve has them, by H in whatever digits the device multiplies gradients in.
fn learned<D: Device>(device: &D) -> Result<Vec<f32>, DeviceError> {
    let (x, len) = (device.upload(&uniform(3, ROWS * COLS))?, ROWS * COLS);
    let mut h = device.zeros(COLS * COLS)?;
    device.gram(&x, ROWS, COLS, &mut h)?;
    let whole = download(device, &h, COLS * COLS)?;
    let diagonal: Vec<f32> = whole.iter().step_by(COLS + 1).copied().collect();
    let steering = device.steering(COLS, &h, &diagonal)?;
    let (lo, delta, target) =
        (device.upload(&uniform(6, len))?, device.upload(&vec![0.5; len])?, device.zeros(len)?);
    let mut soft = device.upload(&uniform(6, len).iter().map(|lo| lo + 0.25).collect::<Vec<_>>())?;
    let [mut v, mut m1, mut m2, mut product] =
        [device.zeros(len)?, device.zeros(len)?, device.zeros(len)?, device.zeros(len)?];
    let buffers = LearnBuffers {
        lo: &lo,
        delta: &delta,
        target: &target,
        v: &mut v,
        m1: &mut m1,
        m2: &mut m2,
        soft: &mut soft,
        product: &mut product,
    };
    let args = StepArgs { lambda: 0.0, grad_scale: 2.0, ..StepArgs::adam(0.01) };
    let mut steps = (1..=20).map(|t| args.at_iteration(t));
    device.learn((ROWS, COLS), &h, steering.as_ref(), buffers, &mut steps)?;
    download(device, &v, len)
}

/// What grids are searched for.
const GRIDS: GridSpec = GridSpec {
    bits: 4,
    scheme: Scheme::Asymmetric,
    granularity: Granularity::PerGroup { group_size: 32 },
    range: RangeEstimator::Mse,
};

/// Dots of runs, scaled rows, copied rows.
fn rows<D: Device>(device: &D) -> Result<Vec<f32>, DeviceError> {
    let (a, b) = (device.upload(&uniform(17, ROWS * COLS))?, device.upload(&uniform(18, ROWS * COLS))?);
    let mut out = device.zeros(ROWS * COLS)?;
    device.scale_rows(COLS, &uniform(19, ROWS), &a, &mut out)?;
    device.copy_rows(COLS, &[3, 66, 0], &b, &mut out)?;
    let mut all = download(device, &out, ROWS * COLS)?;
    all.extend(device.run_dots(ROWS, COLS, 32, &a, &b)?.into_iter().map(|dot| dot as f32));
    Ok(all)
}

fn refine<D: Device>(device: &D) -> Result<Vec<f32>, DeviceError> {
    let mut stream = Stream::new(8, 0, 0);
    let mut integers = |len: usize, limit: u32, shift: f32| -> Vec<f32> {
        (0..len).map(|_| stream.index(limit) as f32 - shift).collect()
    };
    let x = device.upload(&integers((COLS + 3) * COLS, 7, 3.0))?;
    let mut h = device.zeros(COLS * COLS)?;
    device.gram(&x, COLS + 3, COLS, &mut h)?;
    let residual = device.upload(&integers(ROWS * COLS, 400, 200.0))?;
    let delta = device.upload(&vec![1.0; ROWS * COLS])?;
    let mut up = device.upload(&integers(ROWS * COLS, 2, 0.0))?;
    let mut flips = device.zeros(ROWS * 128)?;
    let shape = RefineShape { rows: ROWS, cols: COLS, block: 100..228 };
    let count = device.refine_block(&shape, &h, &residual, &delta, &mut up, &mut flips)?;
    let mut all = [download(device, &up, ROWS * COLS)?, download(device, &flips, ROWS * 128)?].concat();
    all.push(count as f32);
    Ok(all)
}

/// One sweep over all columns, of small integers: every sum is exact, in blocks or row by row.
fn swept<D: Device>(device: &D) -> Result<Vec<f32>, DeviceError> {
    let mut stream = Stream::new(10, 0, 0);
    let mut integers = |len: usize, limit: u32, shift: f32| -> Vec<f32> {
        (0..len).map(|_| stream.index(limit) as f32 - shift).collect()
    };
    let x = device.upload(&integers((COLS + 3) * COLS, 3, 1.0))?;
    let mut h = device.zeros(COLS * COLS)?;
    device.gram(&x, COLS + 3, COLS, &mut h)?;
    let mut residual = device.upload(&integers(ROWS * COLS, 400, 200.0))?;
    let delta = device.upload(&vec![1.0; ROWS * COLS])?;
    let mut up = device.upload(&integers(ROWS * COLS, 2, 0.0))?;
    let mut flips = device.zeros(ROWS * 128)?;
    let done = device.descend(1, ROWS, COLS, &h, &mut residual, &delta, &mut up, &mut flips)?;
    let mut all = [download(device, &up, ROWS * COLS)?, download(device, &residual, ROWS * COLS)?].concat();
    all.push(done.flips as f32);
    Ok(all)
}

fn objective<D: Device>(device: &D) -> Result<Vec<f32>, DeviceError> {
    let upload = |key, len| device.upload(&uniform(key, len));
    let (low, delta) = (upload(11, ROWS * COLS)?, upload(12, ROWS * COLS)?);
    let (up, product) = (upload(13, ROWS * COLS)?, upload(14, ROWS * COLS)?);
    let (roots, gaps) = (upload(15, COLS)?, upload(16, COLS)?);
    let mut errors = device.zeros(ROWS * COLS)?;
    device.rounding_errors(ROWS * COLS, &low, &delta, &up, &mut errors)?;
    let terms = RowTerms { errors: &errors, product: &product, target: &low, roots: &roots, gaps: &gaps };
    let sums = device.row_sums(ROWS, COLS, terms)?;
    let mut all = download(device, &errors, ROWS * COLS)?;
    all.extend(sums.into_iter().flatten().map(|sum| sum as f32));
    Ok(all)
}

fn gathered<D: Device>(device: &D) -> Result<Vec<f32>, DeviceError> {
    let source = device.upload(&uniform(9, ROWS * COLS))?;
    let mut out = device.zeros(5 * COLS)?;
    device.gather_rows(&source, COLS, &[3, 66, 0, 3, 12], &mut out)?;
    download(device, &out, 5 * COLS)
}

fn residuals<D: Device>(device: &D) -> Result<Vec<f32>, DeviceError> {
    let mut all = Vec::new();
    for activation in [
        Activation::Relu,
        Activation::Clip { min: -0.5, max: 0.75 },
        Activation::Sigmoid,
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::HardSwish,
    ] {
        let mut z = device.upload(&uniform(10, ROWS * COLS))?;
        let target = device.upload(&uniform(11, ROWS * COLS))?;
        device.activation_residual(&[activation], &uniform(12, ROWS), ROWS, COLS, &mut z, &target)?;
        all.extend(download(device, &z, ROWS * COLS)?);
    }
    Ok(all)
}

/// Fails at the first method that is further from the CPU than allowed.
pub(crate) fn all<D: Timed>(device: &D, figures: &mut Figures) -> Result<(), String> {
    let mut one =
        |name: &str, got: Result<Vec<f32>, DeviceError>, want: Result<Vec<f32>, DeviceError>, most: f64| {
            let (got, want) = (got.map_err(|e| e.to_string())?, want.map_err(|e| e.to_string())?);
            let off =
                |(got, want): (&f32, &f32)| f64::from((got - want).abs()) / f64::from(want.abs().max(1.0));
            let worst = got
                .iter()
                .zip(&want)
                .map(off)
                .fold(0.0, |a: f64, b| if b.is_nan() { f64::INFINITY } else { a.max(b) });
            figures.say(&format!("check {name}"), worst, "largest", &format!("error, allowed {most:e}"));
            match worst <= most && got.len() == want.len() {
                true => Ok(()),
                false => Err(format!("{name}: error {worst:e} of what the CPU has, allowed {most:e}")),
            }
        };
    one("product", product(device, false), product(&Cpu, false), 2e-5)?;
    one("product, rough", product(device, true), product(&Cpu, true), 2e-2)?;
    one("gram", gram(device), gram(&Cpu), 2e-5)?;
    one("adaround step, 5 iterations", steps(device), steps(&Cpu), 2e-4)?;
    one("adaround, 20 iterations", learned(device), learned(&Cpu), 2e-2)?;
    one("refine block", refine(device), refine(&Cpu), 0.0)?;
    one("refine whole rows", swept(device), swept(&Cpu), 0.0)?;
    one("objective of rows", objective(device), objective(&Cpu), 1e-6)?;
    one("dots, scaled and copied rows", rows(device), rows(&Cpu), 1e-6)?;
    let (w, shape) = (uniform(20, ROWS * COLS), (ROWS, COLS));
    one(
        "grids searched for",
        Ok(device.search(&GRIDS, &w, shape)?),
        Ok(Cpu.search(&GRIDS, &w, shape)?),
        0.0,
    )?;
    one("gather rows", gathered(device), gathered(&Cpu), 0.0)?;
    one("activation residual", residuals(device), residuals(&Cpu), 4e-5)
}
