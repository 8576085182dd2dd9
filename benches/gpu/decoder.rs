//! One block of a language model at the sizes of Llama's 8B and 70B: what running it costs, beside the product's rate of the
//! same run.
//!
//! Weights are drawn here. `forward` asks for the block's output, `capture` for the inputs of all linear layers too, as a job does; both
//! take their input from the host. In f32 they bring what is asked for to the host, in bf16 it stays on the device. Not here: statistics, solving.

use std::sync::Arc;
use std::time::Instant;

use halfstep_compute::decoder::Place;
use halfstep_exec::{Carried, DecoderSession, ExecError, Session, round_to_bf16};
use halfstep_model::decoder::{CarryPrecision, Decoder, LENGTHS};
use halfstep_model::{Data, Tensor};

use crate::block::{Sizes, block};
use crate::figures::Figures;
use crate::times::{Floors, drawn};
use crate::{Asked, Timed};

/// Threads that run shards at once.
const THREADS: [usize; 2] = [1, 8];
/// Runs of each thread; the best of several rounds counts.
const RUNS: usize = 3;
const ROUNDS: usize = 2;

/// Sizes, and tokens of a shard.
fn sizes(asked: &Asked) -> Vec<(Sizes, usize)> {
    match asked.quick {
        true => {
            vec![(Sizes { name: "tiny", hidden: 32, inner: 48, heads: 4, kv_heads: 2, head_dim: 8 }, 9)]
        }
        false => vec![
            (Sizes { name: "8B", hidden: 4096, inner: 14336, heads: 32, kv_heads: 8, head_dim: 128 }, 2048),
            (Sizes { name: "70B", hidden: 8192, inner: 28672, heads: 64, kv_heads: 8, head_dim: 128 }, 2048),
        ],
    }
}

/// Multiplications and additions of all linear layers, for a token.
fn flops(sizes: &Sizes) -> f64 {
    let Sizes { hidden, inner, heads, kv_heads, head_dim, .. } = *sizes;
    2.0 * (hidden * (2 * heads + 2 * kv_heads) * head_dim + 3 * hidden * inner) as f64
}

/// Weights of about the size of a model's.
fn weight(decoder: &Decoder, name: &str) -> Result<Tensor, ExecError> {
    let mut all = decoder.nodes.iter().flat_map(|node| node.op.constants(decoder));
    let found = all.find(|(known, _)| *known == name);
    let (_, shape) = found.ok_or_else(|| ExecError::Missing { name: name.to_owned() })?;
    let scale = 1.0 / (shape[shape.len() - 1] as f32).sqrt();
    let values = drawn(shape.iter().product()).map(|w| w * scale).collect();
    Ok(Tensor::f32(shape, values)?)
}

/// Seconds of a run, on each of so many threads.
fn seconds(
    session: &impl Session,
    x: &Carried,
    outputs: &[&str],
    precision: CarryPrecision,
    threads: usize,
) -> Result<f64, ExecError> {
    let lengths = Tensor::new(vec![1], Data::I64(vec![x.dims()[0] as i64]))?;
    let lengths = Carried::Whole(Arc::new(lengths));
    let inputs = [("x", x), (LENGTHS, &lengths)];
    let runs = || (0..RUNS).try_for_each(|_| session.run_carried(&inputs, outputs, precision).map(drop));
    let round = || {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..threads).map(|_| scope.spawn(runs)).collect();
            all.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
        })?;
        Ok::<_, ExecError>(begun.elapsed().as_secs_f64() / (threads * RUNS) as f64)
    };
    let mut best = round()?;
    for _ in 1..ROUNDS {
        best = best.min(round()?);
    }
    Ok(best)
}

/// Everything of one size.
fn one<P: Place>(
    place: Arc<P>,
    (sizes, tokens): (Sizes, usize),
    precision: CarryPrecision,
    floors: Floors,
    figures: &mut Figures,
) -> Result<(), ExecError> {
    let digits = match precision {
        CarryPrecision::F32 => "f32",
        CarryPrecision::Bf16 => "bf16",
    };
    let decoder = block(sizes, tokens);
    let nodes: Vec<usize> = (1..decoder.nodes.len()).collect();
    let begun = Instant::now();
    let mut constants = |name: &str| weight(&decoder, name);
    let session = DecoderSession::load_at(place, &decoder, &nodes, precision, &mut constants)?;
    let remark = format!("{:.2} GB of weights drawn and taken there", session.bytes() as f64 / 1e9);
    figures.say(
        &format!("block {}, {digits}, load", sizes.name),
        begun.elapsed().as_secs_f64(),
        "s",
        &remark,
    );
    let mut x = Tensor::f32(vec![tokens, sizes.hidden], drawn(tokens * sizes.hidden).collect())?;
    round_to_bf16(&mut x);
    let x = Carried::new(Arc::new(x), precision);
    for (what, outputs) in [("forward", vec!["y"]), ("capture", vec!["norm", "mixed", "norm1", "h", "y"])] {
        for threads in THREADS {
            let taken = seconds(&session, &x, &outputs, precision, threads)?;
            let rate = flops(&sizes) * tokens as f64 / taken;
            let remark = format!(
                "{tokens} tokens; linear layers at {:.1} TFLOP/s, {:.0} % of the large product",
                rate / 1e12,
                100.0 * rate / floors.rough
            );
            let name = format!("block {}, {digits}, {what}, {threads} threads", sizes.name);
            figures.say(&name, taken * 1e3, "ms", &remark);
        }
    }
    Ok(())
}

pub(crate) fn blocks<D: Timed>(
    device: &D,
    asked: &Asked,
    floors: Floors,
    figures: &mut Figures,
) -> Result<(), String> {
    for sizes in sizes(asked) {
        for precision in [CarryPrecision::F32, CarryPrecision::Bf16] {
            let place = device.place().map_err(|error| error.to_string())?;
            one(place, sizes, precision, floors, figures).map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}
