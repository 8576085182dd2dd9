//! One block of a decoder: how near its linear layers, and all of it, come to the machine's own GEMM rate in the same
//! run.
//!
//! Times are the thread's own on the processor (Linux's `schedstat`; elsewhere the clock on the wall), the best of
//! several repetitions: other work on the machine counts as little as it can. Compare ratios rather than times.
//! Run: `cargo bench -p halfstep-benches --bench decoder`. Not here: whole jobs, other kernels (`solver`).
#![expect(clippy::print_stdout, reason = "a benchmark's result is what it prints")]
#![expect(clippy::unwrap_used, reason = "the graphs are written down here")]

#[path = "../block.rs"]
mod block;

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use block::{Sizes, block};
use halfstep_compute::cpu;
use halfstep_compute::random::Stream;
use halfstep_exec::{DecoderSession, Session};
use halfstep_model::decoder::{Decoder, LENGTHS, Op};
use halfstep_model::{Data, Tensor};

/// Repetitions; the best is kept.
const REPETITIONS: u32 = 7;
/// Shortest time of one repetition, in seconds.
const REPETITION_SECONDS: f64 = 0.1;
/// Positions of the sequence.
const POSITIONS: usize = 512;

/// Seconds this thread has computed, if the system says so.
fn processor_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(text.split(' ').next()?.parse::<u64>().ok()? as f64 * 1e-9)
}

fn seconds(mut call: impl FnMut()) -> f64 {
    let (wall, processor) = (Instant::now(), processor_seconds());
    call();
    let processor = processor_seconds().zip(processor).map(|(end, start)| end - start);
    processor.filter(|seconds| *seconds > 0.0).unwrap_or_else(|| wall.elapsed().as_secs_f64())
}

/// Best seconds per call, of calls that together are long enough to be measured.
fn best(mut call: impl FnMut()) -> f64 {
    let mut repeated = |calls: u32| seconds(|| (0..calls).for_each(|_| call())) / f64::from(calls);
    let mut calls = 1;
    while repeated(calls) * f64::from(calls) < REPETITION_SECONDS {
        calls *= 2;
    }
    (0..REPETITIONS).map(|_| repeated(calls)).fold(f64::INFINITY, f64::min)
}

fn uniform(seed: u64, shape: &[usize]) -> Tensor {
    let mut stream = Stream::new(seed, 0, 0);
    let data = (0..shape.iter().product()).map(|_| stream.unit_f32() * 2.0 - 1.0).collect();
    Tensor::f32(shape.to_vec(), data).unwrap()
}

const SIZES: [Sizes; 2] = [
    Sizes { name: "SmolLM2-135M", hidden: 576, inner: 1536, heads: 9, kv_heads: 3, head_dim: 64 },
    Sizes { name: "Llama-1B", hidden: 2048, inner: 5632, heads: 32, kv_heads: 4, head_dim: 64 },
];

fn load(decoder: &Decoder, nodes: &[usize]) -> DecoderSession {
    let shapes = decoder.nodes.iter().flat_map(|node| node.op.constants(decoder)).collect::<Vec<_>>();
    let mut constants = |name: &str| {
        let (_, shape) = shapes.iter().find(|(known, _)| *known == name).unwrap();
        let mut weight = uniform(name.len() as u64, shape);
        let Data::F32(values) = &mut weight.data else { unreachable!("made above") };
        let scale = 1.0 / (shape[shape.len() - 1] as f32).sqrt();
        values.iter_mut().for_each(|w| *w *= scale);
        Ok(weight)
    };
    DecoderSession::load(decoder, nodes, &mut constants).unwrap()
}

/// What a node does, its floating-point operations if it is a product, and seconds per run.
struct Part {
    kind: &'static str,
    flops: f64,
    seconds: f64,
}

/// One node by itself, on random inputs.
fn part(decoder: &Decoder, index: usize, lengths: &Tensor) -> Part {
    let node = &decoder.nodes[index];
    let widths = |name: &str| {
        let writer =
            decoder.nodes.iter().find(|node| node.outputs.iter().any(|output| output == name)).unwrap();
        match &writer.op {
            Op::Linear(linear) => linear.rows,
            Op::Attend(attend) => attend.heads * attend.head_dim,
            Op::Gate(_) => {
                decoder.nodes.iter().find(|node| node.name == "gate").map_or(0, |gate| match &gate.op {
                    Op::Linear(linear) => linear.rows,
                    _ => 0,
                })
            }
            _ => decoder.hidden,
        }
    };
    let inputs: Vec<Tensor> = node
        .inputs
        .iter()
        .map(|name| if name == LENGTHS { lengths.clone() } else { uniform(7, &[POSITIONS, widths(name)]) })
        .collect();
    let inputs: Vec<_> = node.inputs.iter().map(String::as_str).zip(&inputs).collect();
    let session = load(decoder, &[index]);
    let outputs = [node.outputs[0].as_str()];
    let seconds = best(|| drop(black_box(session.run(&inputs, &outputs).unwrap())));
    let (kind, flops) = match &node.op {
        Op::Linear(linear) => ("linear", 2.0 * (linear.rows * linear.cols * POSITIONS) as f64),
        Op::Attend(attend) => {
            ("attention", 2.0 * (POSITIONS * POSITIONS * attend.heads * attend.head_dim) as f64)
        }
        Op::Norm(_) => ("norm", 0.0),
        Op::Gate(_) => ("gate", 0.0),
        _ => ("add", 0.0),
    };
    Part { kind, flops, seconds }
}

fn gemm_seconds() -> f64 {
    let (a, b) = (uniform(1, &[1024, 1024]), uniform(2, &[1024, 1024]));
    let (a, b) = (a.as_f32().unwrap(), b.as_f32().unwrap());
    let mut out = vec![0.0; 1024 * 1024];
    best(|| cpu::matmul(1024, 1024, 1024, 1.0, black_box(a), 1024, black_box(b), 1024, 0.0, &mut out, 1024))
}

const GEMM_FLOPS: f64 = 2.0 * 1024.0 * 1024.0 * 1024.0;

/// Sum of the rates of threads that do the same at once.
fn on_threads(threads: usize, flops: f64, seconds: impl Fn() -> f64 + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    std::thread::scope(|scope| {
        let start = |_| {
            scope.spawn(|| {
                barrier.wait();
                flops / seconds() / 1e9
            })
        };
        let handles: Vec<_> = (0..threads).map(start).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).sum()
    })
}

fn bench(sizes: Sizes) {
    let decoder = block(sizes, POSITIONS);
    let lengths = Tensor::new(vec![1], Data::I64(vec![POSITIONS as i64])).unwrap();
    let x = uniform(3, &[POSITIONS, sizes.hidden]);
    let nodes: Vec<usize> = (1..decoder.nodes.len()).collect();
    let parts: Vec<Part> = nodes.iter().map(|index| part(&decoder, *index, &lengths)).collect();
    let total = |kind: &str| {
        let of = parts.iter().filter(|part| kind.is_empty() || part.kind == kind);
        of.fold((0.0, 0.0), |(flops, seconds), part| (flops + part.flops, seconds + part.seconds))
    };
    let session = load(&decoder, &nodes);
    let inputs = [("x", &x), (LENGTHS, &lengths)];
    let whole = best(|| drop(black_box(session.run(&inputs, &["y"]).unwrap())));
    let gemm = gemm_seconds();
    let (flops, linears) = total("linear");
    let rate = |flops: f64, seconds: f64| flops / seconds / 1e9;
    println!(
        "{} block, T = {POSITIONS}, one thread: gemm {:.1} GFLOP/s, linears {:.1} ({:.0} %), whole block {:.1} ({:.0} %), {:.2} ms",
        sizes.name,
        rate(GEMM_FLOPS, gemm),
        rate(flops, linears),
        rate(flops, linears) / rate(GEMM_FLOPS, gemm) * 100.0,
        rate(flops, whole),
        rate(flops, whole) / rate(GEMM_FLOPS, gemm) * 100.0,
        whole * 1e3
    );
    for kind in ["linear", "attention", "norm", "gate", "add"] {
        let (flops, seconds) = total(kind);
        println!(
            "  {kind:<9} {:>8.3} ms, {:>4.1} % of the parts{}",
            seconds * 1e3,
            seconds / total("").1 * 100.0,
            if flops > 0.0 { format!(", {:.1} GFLOP/s", rate(flops, seconds)) } else { String::new() }
        );
    }
    let gemm = on_threads(2, GEMM_FLOPS, gemm_seconds);
    let whole = on_threads(2, flops, || {
        let session = load(&decoder, &nodes);
        best(|| drop(black_box(session.run(&inputs, &["y"]).unwrap())))
    });
    println!(
        "  two sessions on two threads: gemm {gemm:.1} GFLOP/s, whole blocks {whole:.1} ({:.0} %)",
        whole / gemm * 100.0
    );
}

fn main() {
    println!("level: {}", cpu::isa().name());
    for sizes in SIZES {
        bench(sizes);
    }
}
