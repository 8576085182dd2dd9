//! The decoder's CUDA kernels, run on the host, against their CPU twins.
//!
//! Not here: activations and gates (`cuda_solver_kernels`), the statistics' kernels.

mod shim;

use std::sync::LazyLock;

use halfstep_compute::cpu::{self, Attention, AttentionScratch, RotaryTable, Rows};
use halfstep_compute::random::Stream;
use shim::values::{assert_close, assert_same, uniform};
use shim::{Arg, Array, Family, Grid, by_rows, by_warps, flat, fresh, indices, input, poisoned, size, state};

static NORM: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("norm"));
static ROTARY: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("rotary"));
static ATTENTION: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("attention"));
static SOFTMAX: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("softmax"));
static EXPERTS: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("experts"));
static ELEMENTWISE: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("elementwise"));

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// Each side is within 2e-6 of the definition (cpu/norm.rs).
const NORM_ERROR_MAX: f64 = 4e-6;

#[test]
fn norms_are_the_cpus_in_place_or_not() {
    let (Some(family), mut stream) = (&*NORM, fresh()) else { return };
    for (rows, width) in
        [(1, 1), (3, 2), (2, 13), (9, 31), (5, 32), (4, 33), (7, 64), (2, 127), (3, 128), (2, 129), (2, 576)]
    {
        let x = uniform(&mut stream, rows * width, -0.75, 1.25);
        let weight = uniform(&mut stream, width, 0.0, 2.0);
        let bias = uniform(&mut stream, width, -1.0, 1.0);
        let (mut rms, mut layer) = (x.clone(), x.clone());
        cpu::rms_norm(&x, &weight, 1e-5, &mut rms);
        cpu::layer_norm(&x, &weight, &bias, 1e-2, &mut layer);
        let head = |epsilon| [size(rows), size(width), Arg::F32(epsilon)];
        for in_place in [false, true] {
            let (from, to) =
                if in_place { (state(&x), Arg::Same(3)) } else { (input(&x), poisoned(x.len())) };
            let arguments = [&head(1e-5)[..], &[from.clone(), input(&weight), to.clone()]].concat();
            let got = family.outputs("rms_norm", &by_warps(rows), &arguments).remove(0).f32();
            assert_close(&format!("rms [{rows}, {width}]"), &got, &wide(&rms), NORM_ERROR_MAX);
            let arguments = [&head(1e-2)[..], &[from, input(&weight), input(&bias), to]].concat();
            let got = family.outputs("layer_norm", &by_warps(rows), &arguments).remove(0).f32();
            assert_close(&format!("layer [{rows}, {width}]"), &got, &wide(&layer), NORM_ERROR_MAX);
        }
    }
}

/// Sine and cosine as [`RotaryTable`] has them.
fn angles(frequencies: &[f32], factor: f32, positions: usize) -> [Vec<f32>; 2] {
    let angle = |n: usize| f64::from((n / frequencies.len()) as f32 * frequencies[n % frequencies.len()]);
    let table =
        |f: fn(f64) -> f64| (0..positions * frequencies.len()).map(|n| f(angle(n)) as f32 * factor).collect();
    [table(f64::cos), table(f64::sin)]
}

#[test]
fn heads_turn_as_on_the_cpu() {
    let (Some(family), mut stream) = (&*ROTARY, fresh()) else { return };
    for (tokens, heads, head_dim, pairs) in
        [(1, 1, 2, 1), (5, 3, 8, 4), (4, 2, 7, 2), (3, 5, 64, 32), (2, 1, 5, 0)]
    {
        let frequencies: Vec<f32> = (0..pairs).map(|i| 0.9f32.powi(i)).collect();
        let [cos, sin] = angles(&frequencies, 1.25, 50);
        let table = RotaryTable::new(&frequencies, 1.25, 50);
        let positions: Vec<u32> = (0..tokens).map(|_| stream.index(50)).collect();
        let (stride, out_stride) = (heads * head_dim + 3, heads * head_dim + 1);
        let x = uniform(&mut stream, tokens * stride, -1.0, 1.0);
        let expect = |mut out: Vec<f32>, out_stride: usize| {
            for (token, position) in positions.iter().enumerate() {
                for at in (0..heads).map(|head| head * head_dim) {
                    let from = &x[token * stride + at..][..head_dim];
                    table.turn(*position as usize, from, &mut out[token * out_stride + at..][..head_dim]);
                }
            }
            out
        };
        let head = [size(tokens), size(heads), size(head_dim), size(pairs as usize), indices(&positions)];
        let head = [&head[..], &[input(&cos), input(&sin)]].concat();
        let what = format!("{tokens} tokens, {heads} heads of {head_dim}, {pairs} pairs");
        let out = vec![f32::NAN; tokens * out_stride];
        let tail = [input(&x), size(stride), state(&out), size(out_stride)];
        let got =
            family.outputs("rotate", &by_rows(tokens * heads), &[&head[..], &tail].concat()).remove(0).f32();
        assert_same(&what, &got, &expect(out, out_stride));
        let tail = [state(&x), size(stride), Arg::Same(7), size(stride)];
        let got =
            family.outputs("rotate", &by_rows(tokens * heads), &[&head[..], &tail].concat()).remove(0).f32();
        assert_same(&format!("{what}, in place"), &got, &expect(x.clone(), stride));
    }
}

/// Each side is within 1e-5 of the definition (cpu/attention.rs).
const ATTENTION_ERROR_MAX: f64 = 2e-5;

const PLAIN: Attention<'_> =
    Attention { heads: 1, kv_heads: 1, head_dim: 8, scale: 0.35, softcap: None, window: None, rotary: None };

/// Queries, keys and values side by side in one matrix of `tokens` rows, as fused projections make them.
fn fused(attention: &Attention<'_>, stream: &mut Stream, tokens: usize) -> (Vec<f32>, usize) {
    let stride = (attention.heads + 2 * attention.kv_heads) * attention.head_dim;
    (uniform(stream, tokens * stride, -2.0, 2.0), stride)
}

fn offsets(attention: &Attention<'_>) -> [usize; 3] {
    let q = attention.heads * attention.head_dim;
    [0, q, q + attention.kv_heads * attention.head_dim]
}

fn attend_on_cpu(attention: &Attention<'_>, x: &[f32], stride: usize, lengths: &[usize]) -> Vec<f32> {
    let (mut out, mut scratch, mut start) = (Vec::new(), AttentionScratch::default(), 0);
    for length in lengths {
        let [q, k, v] = offsets(attention)
            .map(|at| Rows { data: x.get(start * stride + at..).unwrap_or_default(), stride });
        let mut part = vec![f32::NAN; length * attention.heads * attention.head_dim];
        cpu::attend(attention, q, k, v, *length, &mut scratch, &mut part);
        out.extend(part);
        start += length;
    }
    out
}

fn attend_by_kernel(
    family: &Family,
    attention: &Attention<'_>,
    x: &[f32],
    stride: usize,
    lengths: &[usize],
) -> Vec<f32> {
    let Attention { heads, kv_heads, head_dim, scale, softcap, window, .. } = *attention;
    let mut starts = vec![0u32];
    for length in lengths {
        starts.push(starts[starts.len() - 1] + *length as u32);
    }
    let longest = lengths.iter().max().copied().unwrap_or(0);
    let tiles = (longest * heads / kv_heads).div_ceil(64) as u32;
    let grid = |x| Grid { blocks: [x, kv_heads as u32, lengths.len() as u32], threads: [256, 1, 1] };
    let kernel = match head_dim {
        ..=64 => "attention_64",
        65..=128 => "attention_128",
        _ => "attention_256",
    };
    let mut arguments = vec![indices(&starts), size(heads), size(kv_heads), size(head_dim)];
    arguments.extend([Arg::F32(scale), Arg::F32(softcap.unwrap_or(0.0)), size(window.unwrap_or(0))]);
    for at in offsets(attention) {
        arguments.extend([input(&x[at..]), size(stride)]);
    }
    arguments.push(poisoned(lengths.iter().sum::<usize>() * heads * head_dim));
    family.outputs(kernel, &[grid(tiles), grid(tiles + 1)], &arguments).remove(0).f32()
}

fn check_attention(stream: &mut Stream, attention: &Attention<'_>, lengths: &[usize]) {
    let Some(family) = &*ATTENTION else { return };
    let (x, stride) = fused(attention, stream, lengths.iter().sum());
    let want = attend_on_cpu(attention, &x, stride, lengths);
    let got = attend_by_kernel(family, attention, &x, stride, lengths);
    assert_close(&format!("{attention:?}, lengths {lengths:?}"), &got, &wide(&want), ATTENTION_ERROR_MAX);
}

#[test]
fn attention_is_the_cpus_at_awkward_lengths_and_widths() {
    let mut stream = fresh();
    for length in [1, 2, 13, 63, 64, 65, 129] {
        check_attention(&mut stream, &PLAIN, &[length]);
    }
    for head_dim in [1, 31, 32, 33, 64, 65, 80, 128, 129, 256] {
        check_attention(&mut stream, &Attention { head_dim, scale: 0.1, ..PLAIN }, &[35]);
    }
    check_attention(
        &mut stream,
        &Attention { head_dim: 96, heads: 4, kv_heads: 2, scale: 0.1, ..PLAIN },
        &[70],
    );
}

/// The definition, in f64.
fn softmax_of(scores: &[f32], seen: std::ops::Range<usize>, scale: f32, softcap: f32) -> Vec<f64> {
    let capped = |x: f32| match softcap {
        0.0 => f64::from(x) * f64::from(scale),
        cap => f64::from(cap) * (f64::from(x) * f64::from(scale) / f64::from(cap)).tanh(),
    };
    let values: Vec<f64> = scores[seen.clone()].iter().map(|x| capped(*x)).collect();
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = values.iter().map(|x| (x - most).exp()).sum();
    let weight = |i: usize| if seen.contains(&i) { (values[i - seen.start] - most).exp() / sum } else { 0.0 };
    (0..scores.len()).map(weight).collect()
}

#[test]
fn rows_of_scores_become_the_softmax_of_the_keys_they_see() {
    let (Some(family), mut stream) = (&*SOFTMAX, fresh()) else { return };
    for (rows, first_row, first_key, window, softcap) in [
        (1, 0, 0, 0, 0.0),
        (3, 0, 0, 0, 0.0),
        (2, 300, 0, 0, 2.0),
        (5, 600, 0, 0, 0.0),
        (4, 700, 600, 90, 0.0),
        (3, 257, 256, 1, 1.5),
        (2, 9, 0, 1000, 0.0),
    ] {
        let keys: usize = first_row + rows - first_key;
        let (heads, pitch) = (2, keys.next_multiple_of(4));
        let mut scores = uniform(&mut stream, heads * rows * pitch, -9.0, 9.0);
        let bad = (rows > 2 && softcap == 0.0).then_some(rows - 1);
        if let Some(row) = bad {
            // Of the first head; it sees all keys up to this.
            scores[row * pitch + keys - 1] = f32::INFINITY;
        }
        let arguments =
            [size(keys), size(pitch), size(first_row), size(first_key), Arg::F32(0.7), Arg::F32(softcap)];
        let grid = Grid { blocks: [rows as u32, heads as u32, 1], threads: [256, 1, 1] };
        let tail = [size(window), state(&scores)];
        let got = family.outputs("softmax_rows", &[grid], &[&arguments[..], &tail].concat()).remove(0).f32();
        for row in 0..heads * rows {
            let behind = first_row + row % rows + 1 - first_key;
            let first = if window == 0 {
                0
            } else {
                (behind + first_key).saturating_sub(window).saturating_sub(first_key)
            };
            let given = &scores[row * pitch..row * pitch + keys];
            let what =
                format!("row {row} of {rows} from {first_row}, keys from {first_key}, window {window}");
            if bad == Some(row) {
                let seen = &got[row * pitch + first..row * pitch + behind];
                assert!(seen.iter().all(|x| x.is_nan()), "{what}");
                continue;
            }
            assert_close(
                &what,
                &got[row * pitch..row * pitch + keys],
                &softmax_of(given, first..behind, 0.7, softcap),
                1e-5,
            );
        }
    }
}

#[test]
fn groups_windows_caps_and_several_sequences_are_the_cpus() {
    let mut stream = fresh();
    for (heads, kv_heads) in [(4, 4), (4, 1), (9, 3), (70, 1)] {
        for window in [None, Some(1), Some(7), Some(1000)] {
            for softcap in [None, Some(1.5)] {
                check_attention(&mut stream, &Attention { heads, kv_heads, window, softcap, ..PLAIN }, &[23]);
            }
        }
    }
    check_attention(&mut stream, &Attention { heads: 2, window: Some(33), ..PLAIN }, &[150, 1, 64, 0, 7]);
    check_attention(&mut stream, &Attention { heads: 2, window: Some(64), ..PLAIN }, &[200]);
}

#[test]
fn rows_of_scores_that_are_not_finite_become_nan_and_others_do_not() {
    let (Some(family), mut stream) = (&*ATTENTION, fresh()) else { return };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let attention = Attention { head_dim: 4, ..PLAIN };
        let (mut x, stride) = fused(&attention, &mut stream, 70);
        // Queries are positive, so that an infinite key gives an infinite score; position 5 has a bad key.
        x.chunks_mut(stride).for_each(|row| row[..4].iter_mut().for_each(|q| *q = q.abs() + 0.1));
        x[5 * stride + 4] = bad;
        let got = attend_by_kernel(family, &attention, &x, stride, &[70]);
        for (position, out) in got.chunks(4).enumerate() {
            assert_eq!(out.iter().all(|x| x.is_nan()), position >= 5, "{bad}: {position}: {out:?}");
            assert_eq!(out.iter().any(|x| x.is_nan()), position >= 5, "{bad}: {position}: {out:?}");
        }
    }
}

/// Logits on a grid, so that equal ones are common and others well apart.
fn logits(stream: &mut Stream, len: usize) -> Vec<f32> {
    (0..len).map(|_| stream.index(48) as f32 * 0.125 - 3.0).collect()
}

#[test]
fn experts_are_chosen_as_on_the_cpu() {
    let (Some(family), mut stream) = (&*EXPERTS, fresh()) else { return };
    for experts in [1, 3, 8, 31, 32, 33, 64, 257, 1024] {
        for (top_k, normalise) in [(1, true), (2, true), (8, false), (experts, true)] {
            let (tokens, top_k) = (9, top_k.min(experts));
            if top_k > 64 {
                continue;
            }
            let x = logits(&mut stream, tokens * experts);
            let mut want = vec![f32::NAN; x.len()];
            cpu::route(&x, experts, top_k, normalise, &mut want);
            let sizes = [size(tokens), size(experts), size(top_k), Arg::U32(u32::from(normalise))];
            let arguments = [&sizes[..], &[input(&x), poisoned(x.len())]].concat();
            let got = family.outputs("route", &by_warps(tokens), &arguments).remove(0).f32();
            let what = format!("top {top_k} of {experts}, normalise {normalise}");
            for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_eq!(*got == 0.0, *want == 0.0, "{what} at {at}: {got}, expected {want}");
            }
            assert_close(&what, &got, &wide(&want), 2e-6);
        }
    }
}

#[test]
fn routes_of_extreme_logits_follow_the_rules() {
    let Some(family) = &*EXPERTS else { return };
    let x = [1000.0, -1000.0, -2000.0, 0.5, f32::NAN, 0.25, 1.0, f32::INFINITY, 0.0];
    let arguments = [size(3), size(3), size(2), Arg::U32(1), input(&x), poisoned(9)];
    let got = family.outputs("route", &by_warps(3), &arguments).remove(0).f32();
    assert_eq!((got[0], got[1], got[2]), (1.0, f32::MIN_POSITIVE, 0.0));
    let mut want = [0.0; 9];
    cpu::route(&x, 3, 2, true, &mut want);
    assert_same("rows that are not finite", &got[3..], &want[3..]);
}

#[test]
fn tokens_are_listed_and_come_back_weighted() {
    let (Some(family), mut stream) = (&*EXPERTS, fresh()) else { return };
    for (tokens, experts, width) in [(1, 1, 1), (7, 3, 5), (255, 2, 4), (256, 4, 3), (600, 3, 33)] {
        let weights: Vec<f32> = (0..tokens * experts)
            .map(|_| if stream.index(2) == 0 { 0.0 } else { stream.unit_f32() })
            .collect();
        for all in [false, true] {
            let blank = |len: usize| Arg::Out(Array::U32(vec![u32::MAX; len]));
            let head = [size(tokens), size(experts), Arg::U32(u32::from(all)), input(&weights)];
            let arguments = [&head[..], &[blank(experts * tokens), blank(experts)]].concat();
            let grid = Grid { blocks: [experts as u32, 1, 1], threads: [256, 1, 1] };
            let outputs = family.outputs("chosen", &[grid], &arguments);
            let [Array::U32(lists), Array::U32(counts)] = &outputs[..] else { unreachable!() };
            for expert in 0..experts {
                let mut want: Vec<u32> =
                    cpu::chosen(&weights, experts, expert, all).map(|token| token as u32).collect();
                let count = want.len();
                assert_eq!(counts[expert] as usize, count);
                let list = &lists[expert * tokens..][..tokens];
                want.resize(tokens, u32::MAX);
                assert_eq!(list, want, "{tokens} tokens, expert {expert} of {experts}, all {all}");
                combine(family, &mut stream, &weights, experts, expert, all, &list[..count], width);
            }
        }
    }
}

fn combine(
    family: &Family,
    stream: &mut Stream,
    weights: &[f32],
    experts: usize,
    expert: usize,
    all: bool,
    tokens: &[u32],
    width: usize,
) {
    let mut x = uniform(stream, tokens.len() * width, -1.0, 1.0);
    for (row, token) in x.chunks_mut(width).zip(tokens) {
        if weights[*token as usize * experts + expert] == 0.0 {
            row.fill(f32::NAN);
        }
    }
    let before = uniform(stream, weights.len() / experts * width, -1.0, 1.0);
    let mut want = before.clone();
    cpu::combine(weights, experts, expert, all, &x, width, &mut want);
    let sizes = [size(tokens.len()), size(width), size(experts), size(expert)];
    let arguments = [&sizes[..], &[input(weights), indices(tokens), input(&x), state(&before)]].concat();
    let got = family.outputs("combine", &by_rows(tokens.len()), &arguments).remove(0);
    assert_same("combine", &got.f32(), &want);
}

/// The nearest bfloat16 by comparing distances; of equals the even one.
fn nearest_bf16(x: f32) -> u16 {
    let down = (x.to_bits() >> 16) as u16;
    let value = |bits: u16| f64::from(f32::from_bits(u32::from(bits) << 16));
    // Beyond the largest comes what would be the next power of two.
    let up =
        if value(down + 1).is_infinite() { 2f64.powi(128).copysign(value(down)) } else { value(down + 1) };
    let (below, above) = ((f64::from(x) - value(down)).abs(), (up - f64::from(x)).abs());
    if below < above || (below == above && down.is_multiple_of(2)) { down } else { down + 1 }
}

#[test]
fn bfloat16_rounds_to_nearest_even_and_widens_exactly() {
    let (Some(family), mut stream) = (&*ELEMENTWISE, fresh()) else { return };
    for len in [1, 3, 4, 5, 1021] {
        let mut x: Vec<f32> = (0..len)
            .map(|_| f32::from_bits(stream.next_u32()))
            .map(|x| if x.is_finite() { x } else { 1.0 })
            .collect();
        let ties =
            [0x3f80_8000, 0x3f81_8000, 0x7f7f_ffff, 0xff7f_ffff, 0x0000_8000, 0x8000_0001, 0x0001_8000];
        for (x, bits) in x.iter_mut().zip(ties) {
            *x = f32::from_bits(bits);
        }
        let want: Vec<u16> = x.iter().map(|x| nearest_bf16(*x)).collect();
        let blank = Arg::Out(Array::U16(vec![0x7fc0; len]));
        let count = Arg::U64(len as u64);
        let got = family.outputs("to_bf16", &flat(len), &[count.clone(), input(&x), blank]).remove(0);
        assert_eq!(got, Array::U16(want.clone()));
        let back = family.outputs("from_bf16", &flat(len), &[count, Arg::In(got), poisoned(len)]).remove(0);
        let exact: Vec<f32> = want.iter().map(|bits| f32::from_bits(u32::from(*bits) << 16)).collect();
        assert_same("widened", &back.f32(), &exact);
    }
    let special =
        [f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)];
    let blank = Arg::Out(Array::U16(vec![0; 4]));
    let got = family.outputs("to_bf16", &flat(4), &[Arg::U64(4), input(&special), blank]).remove(0);
    assert_eq!(got, Array::U16(vec![0x7f80, 0xff80, 0x7fc0, 0xffff]));
}

#[test]
fn embeddings_sums_and_caps_are_the_cpus() {
    let (Some(family), mut stream) = (&*ELEMENTWISE, fresh()) else { return };
    for (count, width) in [(1, 1), (5, 7), (9, 32), (3, 300)] {
        let narrow: Vec<u16> = (0..11 * width).map(|_| (stream.next_u32() >> 16) as u16 & 0xbfff).collect();
        let weight: Vec<f32> = narrow.iter().map(|bits| f32::from_bits(u32::from(*bits) << 16)).collect();
        let learned = uniform(&mut stream, 13 * width, -1.0, 1.0);
        let ids: Vec<u32> = (0..count).map(|_| stream.index(11)).collect();
        let places: Vec<u32> = (0..count).map(|_| stream.index(13)).collect();
        for with_places in [false, true] {
            let entry = |n: usize| {
                let (row, i) = (n / width, n % width);
                let x = weight[ids[row] as usize * width + i] * 1.7;
                if with_places { x + learned[places[row] as usize * width + i] } else { x }
            };
            let want: Vec<f32> = (0..count * width).map(entry).collect();
            let head = [size(count), size(width), Arg::F32(1.7), indices(&ids)];
            let given = [indices(&places), input(&learned)];
            let tail = if with_places { given } else { [Arg::Null, Arg::Null] };
            for (kernel, table) in
                [("embed", input(&weight)), ("embed_bf16", Arg::In(Array::U16(narrow.clone())))]
            {
                let arguments = [&head[..], &[table], &tail, &[poisoned(want.len())]].concat();
                let got = family.outputs(kernel, &by_rows(count), &arguments).remove(0);
                assert_same(kernel, &got.f32(), &want);
            }
        }
    }
    for len in [1, 3, 4, 1025] {
        let (a, b) = (uniform(&mut stream, len, -9.0, 9.0), uniform(&mut stream, len, -9.0, 9.0));
        let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        let count = Arg::U64(len as u64);
        let apart = [count.clone(), input(&a), input(&b), poisoned(len)];
        assert_same("add", &family.outputs("add", &flat(len), &apart).remove(0).f32(), &want);
        let in_place = [count.clone(), state(&a), input(&b), Arg::Same(1)];
        assert_same("add in place", &family.outputs("add", &flat(len), &in_place).remove(0).f32(), &want);
        let mut capped = a.clone();
        cpu::softcap(2.5, &mut capped);
        let got = family.outputs("softcap", &flat(len), &[count, Arg::F32(2.5), state(&a)]).remove(0);
        assert_close("softcap", &got.f32(), &wide(&capped), 2.5e-6);
    }
}
