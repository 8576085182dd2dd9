//! Times of single methods, beside floors measured in the same run.

use std::time::Instant;

use halfstep_compute::random::Stream;
use halfstep_compute::{
    DeviceError, LearnBuffers, MatMut, MatRef, Product, Steering, StepArgs, StepBuffers, StepGradient, cpu,
};

use crate::figures::Figures;
use crate::{Asked, Timed};

/// What this device can do at best.
#[derive(Clone, Copy)]
pub(crate) struct Floors {
    /// Bytes per second of a copy on the device, read and written.
    bytes: f64,
    /// Flops per second of a large product, factors rounded as for gradients.
    pub(crate) rough: f64,
    /// The same, all bits.
    pub(crate) full: f64,
}

/// Rows and columns of layers' chunks; the first is the usual chunk.
fn shapes(asked: &Asked) -> Vec<(usize, usize)> {
    match asked.quick {
        true => vec![(16, 64), (33, 130)],
        false => vec![
            (128, 1024),
            (128, 4096),
            (1024, 1024),
            (2048, 2048),
            (4096, 4096),
            (14336, 4096),
            (4096, 14336),
            (8192, 8192),
        ],
    }
}

/// Seconds of one call: the best of five rounds of as many calls as fill 20 ms, each round waited for.
fn seconds<D: Timed>(
    device: &D,
    mut call: impl FnMut() -> Result<(), DeviceError>,
) -> Result<f64, DeviceError> {
    call()?;
    device.wait()?;
    let mut round = |calls: u32| {
        let begun = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        device.wait()?;
        Ok::<_, DeviceError>(begun.elapsed().as_secs_f64() / f64::from(calls))
    };
    let calls = (0.02 / round(1)?).ceil().clamp(1.0, 500.0) as u32;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        best = best.min(round(calls)?);
    }
    Ok(best)
}

/// Numbers between -1 and 1.
pub(crate) fn drawn(len: usize) -> impl Iterator<Item = f32> {
    // Drawing many gigabytes would take longer than what is measured.
    const DRAWN: usize = 1 << 16;
    let mut stream = Stream::new(1, len as u64, 0);
    let drawn: Vec<f32> = (0..DRAWN).map(|_| stream.unit_f32() * 2.0 - 1.0).collect();
    drawn.into_iter().cycle().take(len)
}

fn uniform<D: Timed>(device: &D, len: usize) -> Result<D::Buffer, DeviceError> {
    device.upload(&drawn(len).collect::<Vec<_>>())
}

fn product_seconds<D: Timed>(
    device: &D,
    (m, n, k): (usize, usize, usize),
    rough: bool,
) -> Result<f64, DeviceError> {
    let (a, b, mut out) = (uniform(device, m * k)?, uniform(device, k * n)?, device.zeros(m * n)?);
    seconds(device, || {
        let (product, left, right) = (Product::new(m, n, k), MatRef::new(&a, k), MatRef::new(&b, n));
        match rough {
            true => device.matmul_rough(product, left, right, MatMut::new(&mut out, n)),
            false => device.matmul(product, left, right, MatMut::new(&mut out, n)),
        }
    })
}

fn flops((m, n, k): (usize, usize, usize)) -> f64 {
    2.0 * m as f64 * n as f64 * k as f64
}

pub(crate) fn floors<D: Timed>(
    device: &D,
    asked: &Asked,
    figures: &mut Figures,
) -> Result<Floors, DeviceError> {
    let len = if asked.quick { 1 << 14 } else { 1 << 28 };
    let (from, mut to) = (uniform(device, len)?, device.zeros(len)?);
    let copy = seconds(device, || device.duplicate(&from, &mut to))?;
    let bytes = (len * 8) as f64 / copy;
    figures.say("copy on the device", bytes / 1e9, "GB/s", "read and written");
    drop((from, to));
    let len = if asked.quick { 1 << 12 } else { 1 << 24 };
    let (mut host, mut buffer) = (vec![1.0; len], device.zeros(len)?);
    let up = seconds(device, || device.write(&host, &mut buffer))?;
    figures.say(
        "copy to the device",
        (len * 4) as f64 / up / 1e9,
        "GB/s",
        "from pageable memory, by one thread",
    );
    let down = seconds(device, || device.download(&buffer, &mut host))?;
    figures.say(
        "copy from the device",
        (len * 4) as f64 / down / 1e9,
        "GB/s",
        "to pageable memory, by one thread",
    );
    let side = if asked.quick { 64 } else { 8192 };
    let rate = |rough| {
        Ok::<_, DeviceError>(flops((side, side, side)) / product_seconds(device, (side, side, side), rough)?)
    };
    let floors = Floors { bytes, rough: rate(true)?, full: rate(false)? };
    let name = format!("product {side}^3");
    figures.say(&format!("{name}, gradients' digits"), floors.rough / 1e12, "TFLOP/s", "");
    figures.say(&format!("{name}, all bits"), floors.full / 1e12, "TFLOP/s", "");
    Ok(floors)
}

pub(crate) fn products<D: Timed>(
    device: &D,
    asked: &Asked,
    floors: Floors,
    figures: &mut Figures,
) -> Result<(), DeviceError> {
    for (m, k) in shapes(asked) {
        for (rough, best, digits) in [(true, floors.rough, "gradient"), (false, floors.full, "full")] {
            let rate = flops((m, k, k)) / product_seconds(device, (m, k, k), rough)?;
            let remark = format!("{:.0} % of the large product", 100.0 * rate / best);
            figures.say(&format!("{digits} product [{m}, {k}]"), rate / 1e12, "TFLOP/s", &remark);
        }
    }
    Ok(())
}

/// After warm start, when the rounding loss is in it.
fn args() -> StepArgs {
    StepArgs { lambda: 3.0, beta: 10.0, ..StepArgs::adam(1e-3) }
}

/// The arrays of one chunk's iterations.
struct Chunk<B> {
    h: B,
    steering: Option<Steering<B>>,
    product: B,
    target: B,
    lo: B,
    delta: B,
    v: B,
    m1: B,
    m2: B,
    soft: B,
}

impl<B> Chunk<B> {
    fn new<D: Timed<Buffer = B>>(device: &D, m: usize, k: usize, square: bool) -> Result<Self, DeviceError> {
        let len = m * k;
        let h = if square { uniform(device, k * k)? } else { device.zeros(1)? };
        let steering = if square { device.steering(k, &h, &vec![1.0; k])? } else { None };
        Ok(Self {
            h,
            steering,
            product: uniform(device, len)?,
            target: uniform(device, len)?,
            lo: uniform(device, len)?,
            delta: uniform(device, len)?,
            v: uniform(device, len)?,
            m1: device.zeros(len)?,
            m2: device.zeros(len)?,
            soft: uniform(device, len)?,
        })
    }

    fn multiply<D: Timed<Buffer = B>>(&mut self, device: &D, m: usize, k: usize) -> Result<(), DeviceError> {
        let (left, right) = (MatRef::new(&self.soft, k), MatRef::new(&self.h, k));
        device.matmul_rough(Product::new(m, k, k), left, right, MatMut::new(&mut self.product, k))
    }

    /// Iterations as a solve has them.
    fn learn<D: Timed<Buffer = B>>(
        &mut self,
        device: &D,
        shape: (usize, usize),
        steps: u32,
    ) -> Result<(), DeviceError> {
        let Self { lo, delta, target, v, m1, m2, soft, product, .. } = self;
        let buffers = LearnBuffers { lo, delta, target, v, m1, m2, soft, product };
        let mut steps = (1..=steps).map(|t| args().at_iteration(t));
        device.learn(shape, &self.h, self.steering.as_ref(), buffers, &mut steps)
    }

    fn step<D: Timed<Buffer = B>>(&mut self, device: &D, len: usize) -> Result<(), DeviceError> {
        let buffers = StepBuffers {
            len,
            gradient: StepGradient::Difference { product: &self.product, target: &self.target },
            lo: &self.lo,
            delta: &self.delta,
            v: &mut self.v,
            m1: &mut self.m1,
            m2: &mut self.m2,
            soft: &mut self.soft,
        };
        device.adaround_step(&args(), buffers)
    }
}

/// Arrays of f32 that a step reads and writes.
const STEP_ARRAYS: usize = 11;

pub(crate) fn step<D: Timed>(
    device: &D,
    asked: &Asked,
    floors: Floors,
    figures: &mut Figures,
) -> Result<(), DeviceError> {
    for (m, k) in shapes(asked) {
        let mut chunk = Chunk::new(device, m, k, false)?;
        let taken = seconds(device, || chunk.step(device, m * k))?;
        let floor = (m * k * STEP_ARRAYS * 4) as f64 / floors.bytes;
        let remark = format!("{:.0} % of a copy of its bytes", 100.0 * floor / taken);
        figures.say(&format!("step [{m}, {k}]"), taken * 1e6, "us", &remark);
    }
    Ok(())
}

/// Iterations in one call of [`Chunk::learn`]: what begins it and ends it counts little.
const STEPS: u32 = 20;
/// Bytes that an iteration's step moves of a weight where its errors are halves: seven arrays read, three written, the errors.
const HALVES_BYTES: usize = 42;

pub(crate) fn iteration<D: Timed>(
    device: &D,
    asked: &Asked,
    floors: Floors,
    figures: &mut Figures,
) -> Result<(), DeviceError> {
    for (m, k) in shapes(asked) {
        let mut chunk = Chunk::new(device, m, k, true)?;
        let product = seconds(device, || chunk.multiply(device, m, k))?;
        let each = seconds(device, || chunk.learn(device, (m, k), STEPS))? / f64::from(STEPS);
        figures.say(
            &format!("iteration [{m}, {k}]"),
            each * 1e6,
            "us",
            &compared(each, product, (m, k), floors),
        );
    }
    Ok(())
}

/// An iteration beside the product with all of H in gradients' digits, and beside its floor: the product in half precision at twice
/// the large product's rate, then the step at the copy's.
fn compared(each: f64, product: f64, (m, k): (usize, usize), floors: Floors) -> String {
    let floor = flops((m, k, k)) / (2.0 * floors.rough) + (m * k * HALVES_BYTES) as f64 / floors.bytes;
    format!(
        "{:.2} of a TF32 product ({:.1} us), {:.0} % of the floor of halves",
        each / product,
        product * 1e6,
        100.0 * floor / each
    )
}

pub(crate) fn gram<D: Timed>(
    device: &D,
    asked: &Asked,
    floors: Floors,
    figures: &mut Figures,
) -> Result<(), DeviceError> {
    let shapes = if asked.quick { vec![(50, 64)] } else { vec![(8192, 1024), (8192, 4096), (8192, 14336)] };
    for (n, k) in shapes {
        let (x, mut g) = (uniform(device, n * k)?, device.zeros(k * k)?);
        let taken = seconds(device, || device.gram(&x, n, k, &mut g))?;
        // A triangle: half of the product's flops.
        let rate = flops((k, k, n)) / 2.0 / taken;
        let remark = format!(
            "{:.1} TFLOP/s, {:.0} % of the full product's rate",
            rate / 1e12,
            100.0 * rate / floors.full
        );
        figures.say(&format!("gram [{n}, {k}]"), taken * 1e3, "ms", &remark);
    }
    Ok(())
}

/// Sweeps over random rows, whose residual is moved before each so that weights flip; the share that does is said.
pub(crate) fn refine<D: Timed>(device: &D, asked: &Asked, figures: &mut Figures) -> Result<(), DeviceError> {
    for (m, k) in shapes(asked) {
        let (h, delta) = (uniform(device, k * k)?, uniform(device, m * k)?);
        let (start, mut up) = (uniform(device, m * k)?, device.zeros(m * k)?);
        let mut residual = device.zeros(m * k)?;
        let mut flips = device.zeros(m * cpu::REFINE_BLOCK)?;
        let (mut flipped, mut sweeps) = (0, 0);
        let taken = seconds(device, || {
            device.subtract(m * k, &mut residual, &start)?;
            let done = device.descend(1, m, k, &h, &mut residual, &delta, &mut up, &mut flips)?;
            (flipped, sweeps) = (flipped + done.flips, sweeps + 1);
            Ok(())
        })?;
        let share = flipped as f64 / f64::from(sweeps) / (m * k) as f64;
        let remark = format!("{:.1} % of the weights flip", 100.0 * share);
        figures.say(&format!("sweep [{m}, {k}]"), taken * 1e3, "ms", &remark);
    }
    Ok(())
}

/// Iterations of the usual chunks on several lanes at once, and their products alone: what a node's threads do together.
pub(crate) fn lanes<D: Timed>(
    device: &D,
    asked: &Asked,
    floors: Floors,
    figures: &mut Figures,
) -> Result<(), DeviceError> {
    let shapes: &[(usize, usize, u32)] =
        if asked.quick { &[(16, 64, 3)] } else { &[(128, 4096, 400), (512, 4096, 200), (256, 14336, 40)] };
    for (m, k, calls) in shapes.iter().copied() {
        for lanes in [1, 4, 16] {
            let all = (0..lanes).map(|_| device.another()).collect::<Result<Vec<D>, _>>()?;
            let mut chunks =
                all.iter().map(|lane| Chunk::new(lane, m, k, true)).collect::<Result<Vec<_>, _>>()?;
            let mut best = |learning: bool| {
                let mut round = || side_by_side(&all, &mut chunks, (m, k), (calls, learning));
                Ok::<_, DeviceError>(round()?.min(round()?).min(round()?) / f64::from(calls * lanes))
            };
            let (product, both) = (best(false)?, best(true)?);
            let remark = compared(both, product, (m, k), floors);
            figures.say(&format!("iteration [{m}, {k}] on {lanes} lanes, each"), both * 1e6, "us", &remark);
        }
    }
    Ok(())
}

/// Seconds for `calls` iterations, or TF32 products alone, on every lane, by a thread each.
fn side_by_side<D: Timed>(
    lanes: &[D],
    chunks: &mut [Chunk<D::Buffer>],
    (m, k): (usize, usize),
    (calls, learning): (u32, bool),
) -> Result<f64, DeviceError> {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let work = |lane: &D, chunk: &mut Chunk<D::Buffer>| {
            if learning {
                chunk.learn(lane, (m, k), calls)?;
            } else {
                (0..calls).try_for_each(|_| chunk.multiply(lane, m, k))?;
            }
            lane.wait()
        };
        let threads: Vec<_> =
            lanes.iter().zip(chunks).map(|(lane, chunk)| scope.spawn(move || work(lane, chunk))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
    })?;
    Ok(begun.elapsed().as_secs_f64())
}
