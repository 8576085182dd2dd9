//! The table behind the solver's defaults, on synthetic layers with correlated inputs.
//!
//! `cargo run --release -p halfstep-solver --example rounding_table` prints, per layer and method, the output error relative
//! to nearest rounding: on the calibration statistics and (after `/`) on the distribution they were drawn from, and
//! the milliseconds of the solve. `-- tune [iterations] [rates] [lambdas]` (comma-separated lists; `tune-samples` on
//! minibatches) prints all layers over a grid of settings instead.
//!
//! Inputs: AR(1) Gaussian, low-rank plus noise, and the same after ReLU (a nonzero mean, as in real networks); the
//! quantized stream has small errors of its own. Not here: real models (`benches`).
#![expect(clippy::print_stdout, reason = "an example's output is its purpose")]

use std::error::Error;
use std::time::Instant;

use halfstep_compute::random::Stream;
use halfstep_compute::{Cpu, cpu};
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_solver::{
    Activation, GramView, RowProblem, SamplesView, Settings, Start, Statistics, Workspace, solve,
};

/// How a layer's input is distributed.
#[derive(Clone, Copy, Debug)]
enum Input {
    Ar { rho: f32 },
    LowRank { rank: usize, noise: f32 },
    Rectified { rank: usize, noise: f32 },
}

struct Moments {
    h: Vec<f32>,
    c: Vec<f32>,
    g: Vec<f32>,
    n: usize,
}

struct Layer {
    name: String,
    rows: usize,
    cols: usize,
    w: Vec<f32>,
    encodings: Encodings,
    seen: Moments,
    unseen: Moments,
    /// Positions of the quantized and the full-precision stream behind `seen`.
    positions: [Vec<f32>; 2],
}

fn draw(input: Input, n: usize, cols: usize, mixing: &[f32], stream: &mut Stream) -> Vec<f32> {
    let mut normals = |len: usize| (0..len).map(|_| stream.normal_f32()).collect::<Vec<f32>>();
    match input {
        Input::Ar { rho } => {
            let mut x = normals(n * cols);
            let innovation = (1.0 - rho * rho).sqrt();
            for row in x.chunks_exact_mut(cols) {
                for j in 1..cols {
                    row[j] = rho * row[j - 1] + innovation * row[j];
                }
            }
            x
        }
        Input::LowRank { rank, noise } | Input::Rectified { rank, noise } => {
            let factors = normals(n * rank);
            let mut x = normals(n * cols);
            cpu::matmul(
                n,
                cols,
                rank,
                1.0 / (rank as f32).sqrt(),
                &factors,
                rank,
                mixing,
                cols,
                noise,
                &mut x,
                cols,
            );
            if matches!(input, Input::Rectified { .. }) {
                x.iter_mut().for_each(|value| *value = value.max(0.0));
            }
            x
        }
    }
}

fn moments(x: &[f32], x_q: &[f32], n: usize, cols: usize) -> Moments {
    let mut all = [const { Vec::new() }; 3];
    for (out, (a, b)) in all.iter_mut().zip([(x_q, x_q), (x, x_q), (x, x)]) {
        out.resize(cols * cols, 0.0);
        cpu::cross_gram(a, b, n, cols, out);
        out.iter_mut().for_each(|value| *value /= n as f32);
    }
    let [h, c, g] = all;
    Moments { h, c, g, n }
}

fn layer(
    input: Input,
    bits: u8,
    n: usize,
    rows: usize,
    cols: usize,
    seed: u64,
) -> Result<Layer, Box<dyn Error>> {
    let mut stream = Stream::new(seed, 0, 0);
    let w: Vec<f32> = (0..rows * cols).map(|_| 0.05 * stream.normal_f32()).collect();
    let mixing: Vec<f32> = (0..cols * cols).map(|_| stream.normal_f32()).collect();
    let mut statistics = |n: usize| {
        let x = draw(input, n, cols, &mixing, &mut stream);
        let x_q: Vec<f32> = x.iter().map(|x| x + 0.05 * stream.normal_f32()).collect();
        (moments(&x, &x_q, n, cols), [x_q, x])
    };
    let ((seen, positions), (unseen, _)) = (statistics(n), statistics(16 * cols));
    let range = RangeEstimator::MinMax;
    let spec = GridSpec { bits, scheme: Scheme::Symmetric, granularity: Granularity::PerChannel, range };
    let encodings = halfstep_quant::estimate(&spec, &w, rows, cols, None)?;
    Ok(Layer {
        name: format!("{input:?} W{bits} {rows}x{cols} n={n}"),
        rows,
        cols,
        w,
        encodings,
        seen,
        unseen,
        positions,
    })
}

/// `sum over rows of e H e' + 2 e (H - C')w' + k`, f32 products, f64 sums.
fn error(layer: &Layer, moments: &Moments, q: &[i32]) -> Result<f64, Box<dyn Error>> {
    let (rows, cols) = (layer.rows, layer.cols);
    let rounded = layer.encodings.dequantize(q)?;
    let dot = |a: &[f32], matrix: &[f32], b: &[f32]| {
        let mut product = vec![0.0; rows * cols];
        cpu::matmul(rows, cols, cols, 1.0, a, cols, matrix, cols, 0.0, &mut product, cols);
        product.iter().zip(b).map(|(p, b)| f64::from(*p) * f64::from(*b)).sum::<f64>()
    };
    let errors: Vec<f32> = rounded.iter().zip(&layer.w).map(|(q, w)| q - w).collect();
    let gap: Vec<f32> = moments.h.iter().zip(&moments.c).map(|(h, c)| h - c).collect();
    let excess: Vec<f32> = moments.g.iter().zip(&moments.c).map(|(g, c)| g - c).collect();
    let constant = dot(&layer.w, &gap, &layer.w) + dot(&layer.w, &excess, &layer.w);
    Ok(dot(&errors, &moments.h, &errors) + 2.0 * dot(&layer.w, &gap, &errors) + constant)
}

struct Outcome {
    seen: f64,
    unseen: f64,
    ms: f64,
    sweeps: u32,
}

fn run(layer: &Layer, settings: &Settings, on_samples: bool) -> Result<Outcome, Box<dyn Error>> {
    let Moments { h, c, g, n } = &layer.seen;
    let [x_q, x_fp] = &layer.positions;
    let statistics = match on_samples {
        true => Statistics::Samples(SamplesView { x_q, x_fp, n: *n }),
        false => Statistics::Gram(GramView { h, c, g_energy: Some(g), count: *n as f64 }),
    };
    let problem = RowProblem {
        w: &layer.w,
        rows: layer.rows,
        cols: layer.cols,
        encodings: &layer.encodings,
        bias: None,
        output_scale: 1.0,
        activation: Activation::Identity,
        statistics,
        layer_key: 0,
        first_row: 0,
    };
    let started = Instant::now();
    let solution = solve(&Cpu, &problem, settings, &mut Workspace::new())?;
    let ms = started.elapsed().as_secs_f64() * 1e3;
    let nearest = layer.encodings.quantize_nearest(&layer.w);
    let ratio = |moments| {
        Ok::<_, Box<dyn Error>>(error(layer, moments, &solution.q)? / error(layer, moments, &nearest)?)
    };
    Ok(Outcome {
        seen: ratio(&layer.seen)?,
        unseen: ratio(&layer.unseen)?,
        ms,
        sweeps: solution.report.refine_sweeps,
    })
}

fn layers() -> Result<Vec<Layer>, Box<dyn Error>> {
    [
        layer(Input::Ar { rho: 0.9 }, 4, 4096, 64, 256, 1),
        layer(Input::LowRank { rank: 32, noise: 0.3 }, 4, 4096, 64, 256, 2),
        layer(Input::Rectified { rank: 64, noise: 0.3 }, 4, 4096, 64, 288, 3),
        layer(Input::Rectified { rank: 64, noise: 0.3 }, 3, 512, 64, 288, 4),
        layer(Input::Rectified { rank: 128, noise: 0.5 }, 2, 8192, 64, 576, 5),
        layer(Input::Ar { rho: 0.5 }, 4, 1024, 32, 27, 6),
    ]
    .into_iter()
    .collect()
}

fn table(layers: &[Layer]) -> Result<(), Box<dyn Error>> {
    let adaround = |iterations| Settings { iterations, refine_sweeps: 0, ..Settings::default() };
    let both = |iterations| Settings { iterations, ..Settings::default() };
    let gptq = |iterations, refine_sweeps| Settings {
        iterations,
        refine_sweeps,
        start: Start::Gptq,
        ..Settings::default()
    };
    let mut methods = vec![("refine only".to_owned(), both(0))];
    for iterations in [100, 300, 1000, 3000] {
        methods.push((format!("adaround {iterations}"), adaround(iterations)));
        methods.push((format!("adaround {iterations} + refine"), both(iterations)));
    }
    methods.push(("gptq start".to_owned(), gptq(0, 0)));
    methods.push(("gptq start + refine".to_owned(), gptq(0, both(0).refine_sweeps)));
    methods.push(("gptq + adaround 300 + refine".to_owned(), gptq(300, both(0).refine_sweeps)));
    let raw = Settings { iterations: 1000, ..Settings::paper() };
    methods.push(("paper's lambda and rate, gram 1000".to_owned(), raw));
    methods.push(("samples 1000 + refine".to_owned(), both(1000)));
    methods.push(("samples 10000, paper's settings".to_owned(), Settings::paper()));
    for layer in layers {
        println!("{}", layer.name);
        for (name, settings) in &methods {
            let Outcome { seen, unseen, ms, sweeps } = run(layer, settings, name.starts_with("samples"))?;
            println!("  {name:36} {seen:.4} / {unseen:.4}  {ms:8.1} ms  {sweeps:3} sweeps");
        }
    }
    Ok(())
}

fn tune(layers: &[Layer], on_samples: bool, arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let numbers = |index: usize, default: &[f32]| match arguments.get(index) {
        Some(list) => list.split(',').map(str::parse).collect::<Result<Vec<f32>, _>>(),
        None => Ok(default.to_vec()),
    };
    let refine_sweeps = Settings::default().refine_sweeps;
    for iterations in numbers(0, &[100.0, 300.0, 1000.0])? {
        for learning_rate in numbers(1, &[3e-3, 1e-2, 3e-2, 1e-1])? {
            for lambda in numbers(2, &[1e-3, 1e-2, 1e-1, 1.0])? {
                print!("{iterations:5} rate {learning_rate:6} lambda {lambda:6} ");
                for refine_sweeps in [0, refine_sweeps] {
                    let base =
                        Settings { iterations: iterations as u32, refine_sweeps, ..Settings::default() };
                    let settings = Settings { learning_rate, lambda, ..base };
                    let seen = layers
                        .iter()
                        .map(|l| run(l, &settings, on_samples).map(|o| o.seen))
                        .collect::<Result<Vec<_>, _>>()?;
                    let mean = seen.iter().map(|s| s.ln()).sum::<f64>() / seen.len() as f64;
                    print!(" | {:.4}:", mean.exp());
                    seen.iter().for_each(|seen| print!(" {seen:.3}"));
                }
                println!();
            }
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let layers = layers()?;
    match arguments.first().map(String::as_str) {
        Some("tune") => tune(&layers, false, &arguments[1..]),
        Some("tune-samples") => tune(&layers, true, &arguments[1..]),
        _ => table(&layers),
    }
}
