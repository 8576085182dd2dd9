//! The decoder's operators on a CUDA device against the CPU, one by one; on machines without one the host pretends to be one.
//!
//! The same calls are made on both places through `Lane`. `HALFSTEP_CUDA_LIBRARIES` names folders of CUDA's libraries, as for
//! the binary. Not here: kernels executed without a device (`cuda_decoder_kernels`), whole decoders (`halfstep_exec`).

#![expect(clippy::print_stdout, reason = "says why a test was skipped")]
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod device;

use std::sync::OnceLock;

use halfstep_compute::cuda::{CudaFactor, CudaLane, CudaPlace, Precision};
use halfstep_compute::decoder::{Embedding, Heads, Lane, Linear, Place, Strided, TableOf, Turn};
use halfstep_compute::random::Stream;
use halfstep_compute::{Activation, DeviceError, Host};

/// Largest error of a result of order 1: each side is within half of it of the definition.
const ERROR_MAX: f32 = 2e-5;
/// The same where products read factors with 11 bits.
const ROUGH_ERROR_MAX: f32 = 2e-3;
/// Copies and sums of two numbers.
const SAME: f32 = 0.0;

/// The first device, its products in all bits, or why there is none.
fn cuda() -> Option<&'static CudaPlace> {
    static OPENED: OnceLock<Option<CudaPlace>> = OnceLock::new();
    let open = || device::cuda_of(Precision::F32).map(|device| CudaPlace::new([&device]).unwrap());
    OPENED.get_or_init(open).as_ref()
}

fn uniform(key: u64, len: usize) -> Vec<f32> {
    let mut stream = Stream::new(key, len as u64, 0);
    (0..len).map(|_| stream.unit_f32() * 2.0 - 1.0).collect()
}

/// What `$work` makes of `$len` numbers on the device and on the CPU, compared.
macro_rules! same_on_both {
    ($what:expr, $tolerance:expr, $len:expr, $work:ident($($argument:expr),*)) => {
        let Some(cuda) = cuda() else { return };
        let got = on(cuda, $len, |lane, out| $work(cuda, lane, out, $($argument),*)).unwrap();
        let host = Host::default();
        let want = on(&host, $len, |lane, out| $work(&host, lane, out, $($argument),*)).unwrap();
        assert_eq!(got.len(), want.len(), "{}", $what);
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            let error = (got - want).abs() / want.abs().max(1.0);
            let alike = got.to_bits() == want.to_bits() || error <= $tolerance || (got.is_nan() && want.is_nan());
            assert!(alike, "{} at {at}: {got}, the CPU has {want}: error {error:e}", $what);
        }
    };
}

type Done = Result<(), DeviceError>;
type Out<P> = <<P as Place>::Lane as Lane>::Array;

/// What `work` writes into an array of `len` numbers, which are NaN before. `work` waits for what reads weights of its own.
fn on<P: Place>(
    place: &P,
    len: usize,
    work: impl FnOnce(&mut P::Lane, &mut Out<P>) -> Done,
) -> Result<Vec<f32>, DeviceError> {
    use std::borrow::{Borrow, BorrowMut};
    place.with(|_, lane| {
        lane.begin(None);
        let mut out = lane.array(len)?;
        let poison = vec![f32::NAN; len];
        let poisoned = lane.given(&poison)?;
        // The sum of NaN and anything: whatever is not written stays NaN.
        lane.add(len, poisoned.borrow(), poisoned.borrow(), out.borrow_mut())?;
        work(lane, out.borrow_mut())?;
        let copied = lane.copied((&out as &<P::Lane as Lane>::Owned).borrow(), len)?;
        let taken = lane.taken(out, len)?;
        lane.finish()?;
        assert!(copied.iter().zip(&taken).all(|(a, b)| a.to_bits() == b.to_bits()));
        Ok(taken)
    })
}

fn embed<P: Place>(place: &P, lane: &mut P::Lane, out: &mut Out<P>, width: usize, learned: bool) -> Done {
    use std::borrow::Borrow;
    let weight = place.keep(uniform(1, 11 * width))?;
    let table = place.keep(uniform(2, 7 * width))?;
    let (ids, places) = ([3, 0, 10, 3, 9], [2, 3, 4, 6, 0]);
    let learned = learned.then(|| (table[0].borrow(), places.as_slice()));
    lane.embed(Embedding { weight: weight[0].borrow(), width, scale: 1.7, ids: &ids, learned }, out)?;
    lane.finish()
}

#[test]
fn embeddings_are_the_cpus() {
    for width in [1, 7, 32, 1030] {
        for learned in [false, true] {
            same_on_both!(
                format!("width {width}, learned {learned}"),
                SAME,
                5 * width,
                embed(width, learned)
            );
        }
    }
}

fn norm<P: Place>(
    place: &P,
    lane: &mut P::Lane,
    out: &mut Out<P>,
    runs: usize,
    width: usize,
    rms: bool,
) -> Done {
    use std::borrow::Borrow;
    let (x, weight, bias) =
        (uniform(3, runs * width), place.keep(uniform(4, width))?, place.keep(uniform(5, width))?);
    let x = lane.given(&x)?;
    match rms {
        true => lane.rms_norm((runs, width), 1e-5, x.borrow(), weight[0].borrow(), out)?,
        false => {
            let weights = (weight[0].borrow(), bias[0].borrow());
            lane.layer_norm((runs, width), 1e-2, x.borrow(), weights, out)?;
        }
    }
    lane.finish()
}

#[test]
fn norms_are_the_cpus() {
    for (runs, width) in [(1, 1), (5, 13), (9, 64), (33, 576), (2, 4096)] {
        for rms in [false, true] {
            let what = format!("{runs} runs of {width}, rms {rms}");
            same_on_both!(what, ERROR_MAX, runs * width, norm(runs, width, rms));
        }
    }
}

fn linear<P: Place>(
    place: &P,
    lane: &mut P::Lane,
    out: &mut Out<P>,
    (tokens, rows, cols): (usize, usize, usize),
    turned: bool,
    bias: bool,
) -> Done {
    use std::borrow::Borrow;
    let scale = 1.0 / (cols as f32).sqrt();
    let weight =
        place.keep_factor(uniform(6, rows * cols).into_iter().map(|w| w * scale).collect(), false)?;
    let offsets = place.keep(uniform(7, rows))?;
    let x = uniform(8, tokens * cols);
    let x = lane.given(&x)?;
    let bias = bias.then(|| offsets[0].borrow());
    lane.linear(tokens, Linear { weight: &weight[0], turned, bias, rows, cols }, x.borrow(), out)?;
    lane.finish()
}

#[test]
fn linear_layers_are_the_cpus() {
    for shape in [(1, 1, 1), (3, 5, 7), (17, 64, 33), (65, 129, 300), (0, 4, 4)] {
        for (turned, bias) in [(false, false), (false, true), (true, false), (true, true)] {
            let what = format!("{shape:?}, turned {turned}, bias {bias}");
            same_on_both!(what, ERROR_MAX, shape.0 * shape.1, linear(shape, turned, bias));
        }
    }
}

/// Factors that bfloat16 holds give the product of all digits; others that of the nearest it holds.
#[test]
fn linear_layers_of_halves_are_products_of_the_nearest_bfloat16() {
    use std::borrow::Borrow;
    let Some(device) = device::cuda_of(Precision::Tf32) else { return };
    let (place, host) = (CudaPlace::new([&device]).unwrap(), Host::default());
    let nearest = |x: &f32| half::bf16::from_f32(*x).to_f32();
    for (tokens, rows, cols) in [(1, 1, 1), (3, 5, 7), (17, 64, 33), (0, 4, 4)] {
        for (turned, with_bias) in [(false, false), (true, true)] {
            let (x, weight, bias) = (uniform(8, tokens * cols), uniform(6, rows * cols), uniform(7, rows));
            let got = on(&place, tokens * rows, |lane, out| {
                let (weight, bias) = (place.keep_factor(weight.clone(), true)?, place.keep(bias.clone())?);
                assert!(matches!(weight[0], CudaFactor::Halves(_)));
                let x = lane.given(&x)?;
                let bias = with_bias.then_some(&bias[0]);
                lane.linear(tokens, Linear { weight: &weight[0], turned, bias, rows, cols }, &x, out)?;
                lane.finish()
            });
            let want = on(&host, tokens * rows, |lane, out| {
                let weight = weight.iter().map(nearest).collect();
                let x: Vec<f32> = x.iter().map(nearest).collect();
                let x = lane.given(&x)?;
                let bias = with_bias.then_some(bias.as_slice());
                lane.linear(tokens, Linear { weight: &weight, turned, bias, rows, cols }, x.borrow(), out)
            });
            for (got, want) in got.unwrap().iter().zip(&want.unwrap()) {
                assert!(
                    (got - want).abs() <= ERROR_MAX * (cols as f32).sqrt(),
                    "{tokens} {rows} {cols}: {got}, expected {want}"
                );
            }
        }
    }
}

const PLAIN: Heads = Heads { heads: 4, kv_heads: 2, head_dim: 16, scale: 0.25, softcap: None, window: None };

fn attend<P: Place>(
    place: &P,
    lane: &mut P::Lane,
    out: &mut Out<P>,
    heads: &Heads,
    lengths: &[usize],
    fused: bool,
    frequencies: &[usize],
) -> Done {
    use std::borrow::Borrow;
    let tokens: usize = lengths.iter().sum();
    let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
    let stride = q + 2 * kv;
    let x = uniform(9, tokens * stride);
    let part = |start: usize, width: usize| -> Vec<f32> {
        x.chunks_exact(stride).flat_map(|row| row[start..start + width].iter().copied()).collect()
    };
    let apart = [part(0, q), part(q, kv), part(q + kv, kv)];
    // A table for each run of sequences: some of them turn fewer pairs.
    let mut tables: Vec<TableOf<P>> = Vec::new();
    for (number, pairs) in frequencies.iter().enumerate() {
        let all: Vec<f32> = (0..*pairs).map(|i| 0.9f32.powi(i as i32 + number as i32)).collect();
        tables.push(place.table(0, &all, 1.25, lengths.iter().copied().max().unwrap_or(0) + number)?);
    }
    let runs = frequencies.len().max(1);
    let ends = |run: usize| if run + 1 == runs { lengths.len() } else { run + 1 };
    let turns: Vec<Turn<'_, TableOf<P>>> = tables
        .iter()
        .enumerate()
        .map(|(run, table)| Turn { sequences: run.min(lengths.len())..ends(run), table })
        .collect();
    let sequences = lane.sequences(lengths)?;
    if fused {
        let x = lane.given(&x)?;
        let qkv = [0, q, q + kv].map(|offset| Strided { array: x.borrow(), offset, stride });
        lane.attend(heads, &turns, &sequences, qkv, out)?;
        return lane.finish();
    }
    let [a, b, c] = [lane.given(&apart[0])?, lane.given(&apart[1])?, lane.given(&apart[2])?];
    let qkv = [(a.borrow(), q), (b.borrow(), kv), (c.borrow(), kv)].map(|(array, stride)| Strided {
        array,
        offset: 0,
        stride,
    });
    lane.attend(heads, &turns, &sequences, qkv, out)?;
    lane.finish()
}

#[test]
fn attention_is_the_cpus() {
    let shapes = [
        PLAIN,
        Heads { window: Some(3), softcap: Some(1.5), ..PLAIN },
        Heads { heads: 3, kv_heads: 1, head_dim: 65, window: Some(40), ..PLAIN },
        Heads { heads: 2, kv_heads: 2, head_dim: 128, ..PLAIN },
        Heads { heads: 2, kv_heads: 1, head_dim: 256, softcap: Some(20.0), ..PLAIN },
    ];
    for heads in &shapes {
        for lengths in [vec![1], vec![70], vec![5, 1, 129, 64], vec![3, 3]] {
            for fused in [false, true] {
                for frequencies in [vec![], vec![8], vec![8, 3]] {
                    if frequencies.len() > lengths.len() {
                        continue;
                    }
                    let len = lengths.iter().sum::<usize>() * heads.heads * heads.head_dim;
                    let what =
                        format!("{heads:?}, lengths {lengths:?}, fused {fused}, pairs {frequencies:?}");
                    same_on_both!(what, ERROR_MAX, len, attend(heads, &lengths, fused, &frequencies));
                }
            }
        }
    }
}

/// Long enough that scores become products; more than one tile, windows that begin in a later one, heads that share keys or do not.
#[test]
fn attention_by_products_is_the_cpus_as_near_as_rough_factors_allow() {
    let Some(device) = device::cuda_of(Precision::Tf32) else { return };
    let place = CudaPlace::new([&device]).unwrap();
    let host = Host::default();
    let small = Heads { heads: 2, kv_heads: 1, head_dim: 6, ..PLAIN };
    let shapes = [
        (small, vec![1100], vec![3]),
        (Heads { window: Some(150), softcap: Some(1.5), ..small }, vec![1030], vec![]),
        (Heads { heads: 3, kv_heads: 3, window: Some(1), ..small }, vec![1, 1027, 600], vec![3]),
        (Heads { window: Some(5000), ..small }, vec![513, 700], vec![3, 2]),
    ];
    for (heads, lengths, pairs) in &shapes {
        let len = lengths.iter().sum::<usize>() * heads.heads * heads.head_dim;
        let got =
            on(&place, len, |lane, out| attend(&place, lane, out, heads, lengths, true, pairs)).unwrap();
        let want = on(&host, len, |lane, out| attend(&host, lane, out, heads, lengths, true, pairs)).unwrap();
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(
                (got - want).abs() <= ROUGH_ERROR_MAX,
                "{heads:?}, {lengths:?} at {at}: {got}, the CPU has {want}"
            );
        }
    }
}

const FUNCTIONS: [Activation; 5] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Clip { min: -0.5, max: 0.25 },
];

fn gate<P: Place>(
    _place: &P,
    lane: &mut P::Lane,
    out: &mut Out<P>,
    f: Activation,
    (rows, width): (usize, usize),
    fused: bool,
) -> Done {
    use std::borrow::Borrow;
    let both = uniform(10, rows * width * 2);
    if fused {
        let x = lane.given(&both)?;
        let [gate, up] = [0, width].map(|offset| Strided { array: x.borrow(), offset, stride: 2 * width });
        return lane.gate(f, (rows, width), gate, up, out);
    }
    let (gate, up) = both.split_at(rows * width);
    let (gate, up) = (lane.given(gate)?, lane.given(up)?);
    let whole = |array| Strided { array, offset: 0, stride: width };
    lane.gate(f, (rows, width), whole(gate.borrow()), whole(up.borrow()), out)
}

fn activate<P: Place>(
    _place: &P,
    lane: &mut P::Lane,
    out: &mut Out<P>,
    f: Activation,
    (rows, width): (usize, usize),
) -> Done {
    use std::borrow::Borrow;
    let x = uniform(11, rows * width);
    let x = lane.given(&x)?;
    lane.activate(f, (rows, width), x.borrow(), out)
}

#[test]
fn gates_and_activations_are_the_cpus() {
    for shape in [(1, 1), (5, 7), (33, 576), (3, 2048)] {
        for f in FUNCTIONS {
            for fused in [false, true] {
                let what = format!("{f:?} {shape:?}, fused {fused}");
                same_on_both!(what, ERROR_MAX, shape.0 * shape.1, gate(f, shape, fused));
            }
            same_on_both!(format!("{f:?} {shape:?}"), ERROR_MAX, shape.0 * shape.1, activate(f, shape));
        }
    }
}

fn add<P: Place>(_place: &P, lane: &mut P::Lane, out: &mut Out<P>, len: usize) -> Done {
    use std::borrow::Borrow;
    let (a, b) = (uniform(12, len), uniform(13, len));
    let (a, b) = (lane.given(&a)?, lane.given(&b)?);
    lane.add(len, a.borrow(), b.borrow(), out)
}

fn softcap<P: Place>(_place: &P, lane: &mut P::Lane, out: &mut Out<P>, len: usize) -> Done {
    use std::borrow::Borrow;
    let x: Vec<f32> = uniform(14, len).into_iter().map(|x| 10.0 * x).collect();
    let x = lane.given(&x)?;
    lane.softcap(len, 2.5, x.borrow(), out)
}

#[test]
fn sums_and_caps_are_the_cpus() {
    for len in [0, 1, 3, 4, 1025, (4 << 20) + 5] {
        same_on_both!(format!("add {len}"), SAME, len, add(len));
        same_on_both!(format!("softcap {len}"), ERROR_MAX, len, softcap(len));
    }
}

/// A layer of experts, each of which doubles its tokens: routed, selected, combined.
fn experts<P: Place>(
    _place: &P,
    lane: &mut P::Lane,
    out: &mut Out<P>,
    (tokens, experts, width): (usize, usize, usize),
    top: (usize, bool),
    all_tokens: bool,
) -> Done {
    use std::borrow::{Borrow, BorrowMut};
    // Logits on a grid: equal ones are common, others well apart.
    let logits: Vec<f32> = uniform(15, tokens * experts).iter().map(|x| (x * 24.0).round() / 8.0).collect();
    let x = uniform(16, tokens * width);
    let (logits, x) = (lane.given(&logits)?, lane.given(&x)?);
    let mut weights = lane.array(tokens * experts)?;
    lane.route((tokens, experts), top, logits.borrow(), weights.borrow_mut())?;
    let weights = weights.borrow() as &Out<P>;
    let choice = lane.choose((tokens, experts), all_tokens, weights)?;
    let mut rows = Vec::new();
    for expert in 0..experts {
        let count = P::Lane::chosen(&choice, expert);
        let (mut chosen, mut twice) = (lane.array(count * width)?, lane.array(count * width)?);
        lane.select(&choice, expert, width, x.borrow(), chosen.borrow_mut())?;
        let chosen: &Out<P> = (&chosen as &<P::Lane as Lane>::Owned).borrow();
        lane.add(count * width, chosen, chosen, twice.borrow_mut())?;
        rows.push(twice);
    }
    let rows: Vec<&Out<P>> = rows.iter().map(Borrow::borrow).collect();
    lane.combine(&choice, width, weights, &rows, out)
}

#[test]
fn experts_are_the_cpus() {
    for shape in [(1, 1, 1), (9, 4, 5), (300, 8, 33), (70, 128, 64)] {
        for top in [(1, true), (2.min(shape.1), false), (shape.1.min(8), true)] {
            for all in [false, true] {
                let what = format!("{shape:?}, top {top:?}, all {all}");
                same_on_both!(what, ERROR_MAX, shape.0 * shape.2, experts(shape, top, all));
            }
        }
    }
}

/// The sentence of a call that must be refused.
fn refused(work: impl FnOnce(&CudaPlace, &mut CudaLane) -> Done) -> String {
    let place = cuda().expect("the caller has looked");
    place.with(|_, lane| work(place, lane)).unwrap_err().to_string()
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_launched() {
    if cuda().is_none() {
        return;
    }
    let short = "buffer too short, expected at least";
    let heads = |change: Heads, lengths: &[usize]| {
        refused(|place, lane| {
            let mut out = lane.array(1 << 16)?;
            attend(place, lane, &mut out, &change, lengths, false, &[])
        })
    };
    assert!(heads(Heads { head_dim: 257, ..PLAIN }, &[2]).contains("attention head width: index 257"));
    assert!(heads(Heads { window: Some(0), ..PLAIN }, &[2]).contains("window Some(0)"));
    assert!(heads(PLAIN, &vec![0; 65536]).contains("sequences: index 65536 out of range"));
    assert!(heads(PLAIN, &[1025]).contains("attention out: buffer too short"));
    for (what, expect, message) in [
        (
            "an id past the table",
            "embedding ids: index 11",
            refused(|place, lane| {
                let (weight, mut out) = (place.keep(uniform(1, 33))?, lane.array(9)?);
                let embedding =
                    Embedding { weight: &weight[0], width: 3, scale: 1.0, ids: &[0, 11], learned: None };
                lane.embed(embedding, &mut out)
            }),
        ),
        (
            "a norm of too many runs",
            short,
            refused(|place, lane| {
                let (weight, x) = (place.keep(uniform(1, 4))?, lane.given(&[1.0; 8])?);
                let mut out = lane.array(12)?;
                lane.rms_norm((3, 4), 1e-5, &x, &weight[0], &mut out)
            }),
        ),
        (
            "a bias that is too short",
            "bias: buffer too short",
            refused(|place, lane| {
                let (weight, bias) = (place.keep_factor(uniform(1, 12), false)?, place.keep(uniform(1, 2))?);
                let (x, mut out) = (lane.given(&[1.0; 8])?, lane.array(6)?);
                let bias = Some(&bias[0]);
                let linear = Linear { weight: &weight[0], turned: false, bias, rows: 3, cols: 4 };
                lane.linear(2, linear, &x, &mut out)
            }),
        ),
        (
            "weights as an output",
            "the buffer is shared",
            refused(|place, lane| {
                let mut weight = place.keep(uniform(1, 4))?;
                let x = lane.given(&[1.0; 4])?;
                lane.add(4, &x, &x, &mut weight[0])
            }),
        ),
        (
            "a gate past its rows",
            "gate up: buffer too short",
            refused(|_, lane| {
                let (x, mut out) = (lane.given(&[1.0; 8])?, lane.array(4)?);
                let [gate, up] = [0, 3].map(|offset| Strided { array: &x, offset, stride: 4 });
                lane.gate(Activation::Silu, (2, 2), gate, up, &mut out)
            }),
        ),
        (
            "more chosen than there are",
            "top 3 of 2",
            refused(|_, lane| {
                let (x, mut out) = (lane.given(&[1.0; 4])?, lane.array(4)?);
                lane.route((2, 2), (3, true), &x, &mut out)
            }),
        ),
        ("an array that fits nowhere", "out of memory", refused(|_, lane| lane.array(1 << 40).map(drop))),
        (
            "a table of another device",
            "device: index 7",
            refused(|place, _| place.table(7, &[1.0], 1.0, 1).map(drop)),
        ),
    ] {
        assert!(message.contains(expect), "{what}: {message}");
    }
    let short_table = refused(|place, lane| {
        let (table, x) = (place.table(0, &[1.0, 0.5], 1.0, 2)?, lane.given(&[1.0; 3 * 128])?);
        let (sequences, mut out) = (lane.sequences(&[3])?, lane.array(3 * 64)?);
        let qkv = [(0, 64), (64, 32), (96, 32)].map(|(offset, _)| Strided { array: &x, offset, stride: 128 });
        lane.attend(&PLAIN, &[Turn { sequences: 0..1, table: &table }], &sequences, qkv, &mut out)
    });
    assert!(short_table.contains("rotary positions: buffer too short"), "{short_table}");
}

#[test]
fn what_stays_is_what_would_have_come_to_the_host_and_takes_room_while_it_is_there() {
    let Some(cuda) = cuda() else { return };
    let mut values = uniform(21, 5000);
    values[4321] = -7.03;
    let ran = cuda.with(|_, lane| {
        let x = lane.given(&values)?;
        assert!(lane.stay(&x, 5000)?.is_none(), "nothing may stay before it is let");
        cuda.let_stay((1, 1 << 14))?;
        let want = lane.copied_halves(&x, 5000)?;
        let stays = lane.stay(&x, 5000)?.unwrap();
        assert_eq!((stays.len(), stays.download()?), (5000, want.clone()));
        assert_eq!(stays.peak(), half::bf16::from_f32(7.03).to_f32());
        let (here, there) = (lane.given_halves(&want)?, lane.given_staying(&stays)?);
        assert_eq!(lane.copied(&here, 5000)?, lane.copied(&there, 5000)?);
        // Room for few of that length on any device; what is dropped makes room again.
        let mut all = Vec::new();
        while let Some(more) = lane.stay(&x, 5000)? {
            all.push(more);
            assert!(all.len() < 1 << 20, "there is no end to what may stay");
        }
        let one = all.pop();
        assert!(lane.stay(&x, 5000)?.is_none());
        drop(one);
        assert!(lane.stay(&x, 5000)?.is_some());
        assert_eq!(
            Host::default().with(|_, host| host.given_staying(&stays).map(|x| x.into_owned()))?,
            lane.copied(&here, 5000)?
        );
        cuda.let_stay((0, 1))?;
        assert!(lane.stay(&x, 5000)?.is_none());
        let empty = lane.given(&[])?;
        assert!(lane.stay(&empty, 0)?.is_none_or(|nothing| nothing.is_empty() && nothing.peak() == 0.0));
        let infinite = lane.given(&[1.0, f32::NAN, f32::INFINITY])?;
        cuda.let_stay((1, 2))?;
        assert!(lane.stay(&infinite, 3)?.unwrap().peak().is_nan());
        cuda.let_stay((0, 1))
    });
    ran.unwrap();
}
