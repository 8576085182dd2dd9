//! Decoders run by `DecoderSession` against plain f64 arithmetic written down beside them.
//!
//! Not here: families against their reference implementation (`decoder_families`).

#![expect(clippy::unwrap_used, reason = "tests")]

use halfstep_exec::{DecoderSession, ExecError, Session};
use halfstep_model::decoder::{
    Attend, Decoder, DecoderNode, Embed, Gating, Linear, Norm, NormKind, Op, Positions, Rotary, Rotation,
    Route, Select,
};
use halfstep_model::{Data, Tensor};

const HIDDEN: usize = 12;
const VOCABULARY: usize = 17;
const EXPERTS: usize = 3;

fn node(name: &str, op: Op, inputs: &[&str], outputs: &[&str]) -> DecoderNode {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    DecoderNode { name: name.to_owned(), op, inputs: owned(inputs), outputs: owned(outputs) }
}

fn linear(name: &str, cols: usize, rows: usize, bias: bool, transposed: bool, input: &str) -> DecoderNode {
    let op = Op::Linear(Linear {
        weight: format!("{name}.weight"),
        bias: bias.then(|| format!("{name}.bias")),
        rows,
        cols,
        transposed,
        kept: None,
    });
    node(name, op, &[input], &[&format!("{name}.out")])
}

fn norm(name: &str, kind: NormKind, width: usize, input: &str) -> DecoderNode {
    let op = Op::Norm(Norm {
        kind,
        weight: format!("{name}.weight"),
        bias: (kind == NormKind::Layer).then(|| format!("{name}.bias")),
        epsilon: 1e-3,
        width,
    });
    node(name, op, &[input], &[&format!("{name}.out")])
}

/// Everything once: learned positions, three norms, fused and separate attention inputs, a gated and a plain network,
/// a mixture of experts, a capped head.
fn decoder(all_tokens: bool) -> Decoder {
    let rotary = Rotary { width: 2, rotation: Rotation::Fixed { frequencies: vec![0.7], factor: 1.1 } };
    let attend = Attend {
        heads: 4,
        kv_heads: 2,
        head_dim: 3,
        scale: 0.5,
        softcap: Some(3.0),
        window: Some(3),
        rotary: Some(rotary),
    };
    let plain = Attend { softcap: None, window: None, rotary: None, ..attend.clone() };
    let embed = Embed {
        weight: "embed".into(),
        scale: 1.5,
        positions: Some(Positions { weight: "positions".into(), offset: 2 }),
    };
    let mut nodes = vec![
        node("embed", Op::Embed(embed), &["input_ids"], &["x0", "lengths"]),
        norm("n0", NormKind::Rms, HIDDEN, "x0"),
        linear("q", HIDDEN, 12, true, false, "n0.out"),
        linear("k", HIDDEN, 6, false, false, "n0.out"),
        linear("v", HIDDEN, 6, true, true, "n0.out"),
        norm("qn", NormKind::RmsUnitOffset, 3, "q.out"),
        node("attend", Op::Attend(attend), &["qn.out", "k.out", "v.out", "lengths"], &["mixed"]),
        linear("o", 12, HIDDEN, false, false, "mixed"),
        node("add", Op::Add, &["x0", "o.out"], &["x1"]),
        norm("n1", NormKind::Layer, HIDDEN, "x1"),
        linear("qkv", HIDDEN, 24, true, true, "n1.out"),
        node("attend1", Op::Attend(plain), &["qkv.out", "lengths"], &["mixed1"]),
        node("add1", Op::Add, &["x1", "mixed1"], &["x2"]),
        linear("gate_up", HIDDEN, 10, false, false, "x2"),
        node("gated", Op::Gate(Gating::GeluTanh), &["gate_up.out"], &["h"]),
        linear("down", 5, HIDDEN, false, false, "h"),
        node("f", Op::Activate(Gating::Relu), &["down.out"], &["x3"]),
        linear("router", HIDDEN, EXPERTS, false, false, "x3"),
        node(
            "route",
            Op::Route(Route { experts: EXPERTS, top_k: 2, normalise: true }),
            &["router.out"],
            &["weights"],
        ),
    ];
    let mut experts = vec!["weights".to_owned()];
    for expert in 0..EXPERTS {
        let name = |part: &str| format!("e{expert}.{part}");
        let select = Op::Select(Select { expert, all_tokens });
        nodes.push(node(&name("select"), select, &["x3", "weights"], &[&name("in")]));
        nodes.push(linear(&name("up"), HIDDEN, 7, false, false, &name("in")));
        nodes.push(node(&name("f"), Op::Activate(Gating::Silu), &[&name("up.out")], &[&name("h")]));
        nodes.push(linear(&name("down"), 7, HIDDEN, false, false, &name("h")));
        experts.push(name("down.out"));
    }
    let experts: Vec<&str> = experts.iter().map(String::as_str).collect();
    nodes.push(node("combine", Op::Combine { all_tokens }, &experts, &["x4"]));
    nodes.push(linear("head", HIDDEN, VOCABULARY, false, false, "x4"));
    nodes.push(node("cap", Op::Softcap { cap: 2.0 }, &["head.out"], &["logits"]));
    let decoder =
        Decoder { family: "test".into(), hidden: HIDDEN, vocabulary: VOCABULARY, positions: 9, nodes };
    decoder.validate().unwrap();
    decoder
}

/// Numbers that depend on the name alone, of order 1.
fn constant(name: &str, shape: &[usize]) -> Tensor {
    let seed = name.bytes().fold(17u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(u32::from(byte)));
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let data = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::f32(shape.to_vec(), data).unwrap()
}

fn shape_of(decoder: &Decoder, name: &str) -> Vec<usize> {
    let all = decoder.nodes.iter().flat_map(|node| node.op.constants(decoder));
    all.into_iter().find(|(known, _)| *known == name).expect("a constant of the decoder").1
}

fn load(decoder: &Decoder, nodes: &[usize]) -> DecoderSession {
    let mut constants = |name: &str| Ok(constant(name, &shape_of(decoder, name)));
    DecoderSession::load(decoder, nodes, &mut constants).unwrap()
}

fn whole(decoder: &Decoder) -> DecoderSession {
    load(decoder, &(0..decoder.nodes.len()).collect::<Vec<_>>())
}

fn tokens(rows: &[&[i64]]) -> Tensor {
    let width = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let pad = |row: &&[i64]| [row, vec![-1; width - row.len()].as_slice()].concat();
    let data = rows.iter().flat_map(pad).collect();
    Tensor::new(vec![rows.len(), width], Data::I64(data)).unwrap()
}

const BATCH: [&[i64]; 3] = [&[3, 0, 16, 5, 5, 1, 2], &[7], &[4, 4, 9, 11]];

/// Plain arithmetic in f64, one row of numbers per token.
mod plain {
    use super::*;
    type Rows = Vec<Vec<f64>>;

    fn weight(decoder: &Decoder, name: &str) -> Vec<f64> {
        let tensor = constant(name, &shape_of(decoder, name));
        tensor.as_f32().unwrap().iter().map(|x| f64::from(*x)).collect()
    }

    fn apply(f: Gating, x: f64) -> f64 {
        match f {
            Gating::Silu => x / (1.0 + (-x).exp()),
            Gating::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }
            Gating::Relu => x.max(0.0),
            Gating::Gelu => unreachable!("not in this decoder"),
        }
    }

    fn linear(decoder: &Decoder, linear: &Linear, x: &Rows) -> Rows {
        let w = weight(decoder, &linear.weight);
        let bias = linear.bias.as_ref().map(|name| weight(decoder, name));
        let at = |r: usize, c: usize| {
            if linear.transposed { w[c * linear.rows + r] } else { w[r * linear.cols + c] }
        };
        let one = |x: &Vec<f64>, r: usize| {
            (0..linear.cols).map(|c| at(r, c) * x[c]).sum::<f64>() + bias.as_ref().map_or(0.0, |b| b[r])
        };
        x.iter().map(|x| (0..linear.rows).map(|r| one(x, r)).collect()).collect()
    }

    fn norm(decoder: &Decoder, norm: &Norm, x: &Rows) -> Rows {
        let w = weight(decoder, &norm.weight);
        let bias = norm.bias.as_ref().map(|name| weight(decoder, name));
        let run = |x: &[f64]| {
            let n = x.len() as f64;
            let mean = if norm.kind == NormKind::Layer { x.iter().sum::<f64>() / n } else { 0.0 };
            let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            let unit = if norm.kind == NormKind::RmsUnitOffset { 1.0 } else { 0.0 };
            let one = |i: usize| {
                (x[i] - mean) / (square + f64::from(norm.epsilon)).sqrt() * (w[i] + unit)
                    + bias.as_ref().map_or(0.0, |b| b[i])
            };
            (0..x.len()).map(one).collect::<Vec<_>>()
        };
        x.iter().map(|row| row.chunks(norm.width).flat_map(run).collect()).collect()
    }

    fn turn(rotary: Option<&Rotary>, position: usize, head: &[f64]) -> Vec<f64> {
        let mut out = head.to_vec();
        if let Some(Rotary { rotation: Rotation::Fixed { frequencies, factor }, .. }) = rotary {
            for (i, frequency) in frequencies.iter().enumerate() {
                let (sin, cos) = (position as f64 * f64::from(*frequency)).sin_cos();
                let (a, b, factor) = (head[i], head[i + frequencies.len()], f64::from(*factor));
                out[i] = (a * cos - b * sin) * factor;
                out[i + frequencies.len()] = (b * cos + a * sin) * factor;
            }
        }
        out
    }

    fn attend(a: &Attend, q: &[Vec<f64>], k: &[Vec<f64>], v: &[Vec<f64>]) -> Rows {
        let dim = a.head_dim;
        let one = |t: usize, head: usize| {
            let kv = head / (a.heads / a.kv_heads);
            let query = turn(a.rotary.as_ref(), t, &q[t][head * dim..][..dim]);
            let first = a.window.map_or(0, |w| (t + 1).saturating_sub(w));
            let score = |s: usize| {
                let key = turn(a.rotary.as_ref(), s, &k[s][kv * dim..][..dim]);
                let score = query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() * f64::from(a.scale);
                a.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh()).exp()
            };
            let weights: Vec<f64> = (first..=t).map(score).collect();
            let sum: f64 = weights.iter().sum();
            let value =
                |i: usize| (first..=t).map(|s| weights[s - first] * v[s][kv * dim + i]).sum::<f64>() / sum;
            (0..dim).map(value).collect::<Vec<_>>()
        };
        (0..q.len()).map(|t| (0..a.heads).flat_map(|head| one(t, head)).collect()).collect()
    }

    fn route(route: &Route, logits: &[f64]) -> Vec<f64> {
        let sum: f64 = logits.iter().map(|x| x.exp()).sum();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let mut out = vec![0.0; logits.len()];
        order[..route.top_k].iter().for_each(|e| out[*e] = logits[*e].exp() / sum);
        let kept: f64 = out.iter().sum();
        out.iter().map(|x| if route.normalise { x / kept } else { *x }).collect()
    }

    /// One sequence; tensors by name. Experts see every token.
    pub(super) fn run(decoder: &Decoder, ids: &[i64]) -> std::collections::HashMap<String, Rows> {
        let mut all: std::collections::HashMap<String, Rows> = Default::default();
        for node in &decoder.nodes {
            let input = |i: usize| &all[&node.inputs[i]];
            let map = |x: &Rows, f: &dyn Fn(f64) -> f64| -> Rows {
                x.iter().map(|row| row.iter().map(|x| f(*x)).collect()).collect()
            };
            let out = match &node.op {
                Op::Embed(embed) => {
                    let (w, p) = (weight(decoder, &embed.weight), weight(decoder, "positions"));
                    let one = |t: usize, i: usize| {
                        w[ids[t] as usize * HIDDEN + i] * f64::from(embed.scale) + p[(t + 2) * HIDDEN + i]
                    };
                    (0..ids.len()).map(|t| (0..HIDDEN).map(|i| one(t, i)).collect()).collect()
                }
                Op::Norm(n) => norm(decoder, n, input(0)),
                Op::Linear(l) => linear(decoder, l, input(0)),
                Op::Attend(a) if node.inputs.len() == 4 => attend(a, input(0), input(1), input(2)),
                Op::Attend(a) => {
                    let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
                    let part = |from: usize, n: usize| -> Rows {
                        input(0).iter().map(|row| row[from..from + n].to_vec()).collect()
                    };
                    attend(a, &part(0, q), &part(q, kv), &part(q + kv, kv))
                }
                Op::Gate(f) => {
                    let halves = |row: &Vec<f64>| {
                        let (gate, up) = row.split_at(row.len() / 2);
                        gate.iter().zip(up).map(|(g, u)| apply(*f, *g) * u).collect()
                    };
                    input(0).iter().map(halves).collect()
                }
                Op::Activate(f) => map(input(0), &|x| apply(*f, x)),
                Op::Add => {
                    let rows = input(0).iter().zip(input(1));
                    rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect()
                }
                Op::Softcap { cap } => map(input(0), &|x| f64::from(*cap) * (x / f64::from(*cap)).tanh()),
                Op::Route(r) => input(0).iter().map(|row| route(r, row)).collect(),
                Op::Select(_) => input(0).clone(),
                Op::Combine { .. } => {
                    let row = |t: usize| {
                        let one =
                            |i: usize| (0..EXPERTS).map(|e| input(0)[t][e] * input(1 + e)[t][i]).sum::<f64>();
                        (0..HIDDEN).map(one).collect()
                    };
                    (0..ids.len()).map(row).collect()
                }
            };
            all.insert(node.outputs[0].clone(), out);
        }
        all
    }
}

/// A dozen operators in f32 one after the other, numbers of order 1 to 10.
const TOLERANCE: f64 = 1e-4;

fn assert_close(name: &str, got: &Tensor, want: &[Vec<f64>]) {
    assert_eq!(got.shape[0], want.len(), "rows of `{name}`");
    let got = got.as_f32().unwrap();
    for (i, (got, want)) in got.iter().zip(want.iter().flatten()).enumerate() {
        let error = (f64::from(*got) - want).abs() / want.abs().max(1.0);
        assert!(error <= TOLERANCE, "`{name}` at {i}: {got}, expected {want}");
    }
}

#[test]
fn every_operator_computes_its_definition() {
    for all_tokens in [false, true] {
        let decoder = decoder(all_tokens);
        let session = whole(&decoder);
        let ids = tokens(&BATCH);
        let names: Vec<&str> = decoder.nodes.iter().map(|node| node.outputs[0].as_str()).collect();
        let outputs = session.run(&[("input_ids", &ids)], &names).unwrap();
        let want: Vec<_> = BATCH.iter().map(|ids| plain::run(&decoder, ids)).collect();
        for (name, got) in names.iter().zip(&outputs) {
            let rows: Vec<Vec<f64>> = want.iter().flat_map(|all| all[*name].clone()).collect();
            let expert = name.strip_prefix('e').and_then(|rest| rest.split_once('.')).map(|(e, _)| e);
            match expert.and_then(|expert| expert.parse::<usize>().ok()).filter(|_| !all_tokens) {
                Some(expert) => {
                    let weights = want.iter().flat_map(|all| all["weights"].clone());
                    let chosen = rows.into_iter().zip(weights).filter(|(_, weights)| weights[expert] != 0.0);
                    assert_close(name, got, &chosen.map(|(row, _)| row).collect::<Vec<_>>());
                }
                None => assert_close(name, got, &rows),
            }
        }
    }
}

#[test]
fn segments_one_after_the_other_are_the_whole() {
    let decoder = decoder(false);
    let ids = tokens(&BATCH);
    let want = whole(&decoder).run(&[("input_ids", &ids)], &["logits"]).unwrap().remove(0);
    for cut in 1..decoder.nodes.len() {
        let first = load(&decoder, &(0..cut).collect::<Vec<_>>());
        let second = load(&decoder, &(cut..decoder.nodes.len()).collect::<Vec<_>>());
        let written = decoder.nodes[..cut].iter().flat_map(|node| &node.outputs);
        let read: Vec<&str> = written
            .map(String::as_str)
            .filter(|name| decoder.nodes[cut..].iter().any(|node| node.inputs.iter().any(|i| i == name)))
            .collect();
        let carried = first.run(&[("input_ids", &ids)], &read).unwrap();
        let inputs: Vec<_> = read.iter().copied().zip(&carried).collect();
        assert_eq!(second.run(&inputs, &["logits"]).unwrap()[0], want, "cut before node {cut}");
    }
}

#[test]
fn what_is_given_is_not_computed() {
    let decoder = decoder(false);
    let session = whole(&decoder);
    let ids = tokens(&[&[1, 2, 3]]);
    let weights = Tensor::f32(vec![3, 3], [[0.0, 0.0, 1.0]; 3].concat()).unwrap();
    let inputs = [("input_ids", &ids), ("weights", &weights)];
    let names = ["e0.in", "e2.in", "x3", "weights"];
    let outputs = session.run(&inputs, &names).unwrap();
    assert_eq!(outputs[0].shape, [0, HIDDEN]);
    assert_eq!(outputs[1], outputs[2]);
    assert_eq!(outputs[3], weights);
    assert_eq!(session.run(&inputs, &["x4"]).unwrap()[0].shape, [3, HIDDEN]);
    // Asked for twice, and in another order.
    let twice = session.run(&inputs, &["x3", "e0.in", "x3"]).unwrap();
    assert_eq!((&twice[0], &twice[2]), (&outputs[2], &outputs[2]));
}

#[test]
fn a_sequence_is_the_same_whatever_stands_beside_it() {
    let decoder = decoder(false);
    let session = whole(&decoder);
    let together = session.run(&[("input_ids", &tokens(&BATCH))], &["logits", "lengths"]).unwrap();
    assert_eq!(together[1].as_i64(), Some(&[7, 1, 4][..]));
    let mut rows = together[0].as_f32().unwrap();
    for ids in BATCH {
        let alone = session.run(&[("input_ids", &tokens(&[ids]))], &["logits"]).unwrap();
        for (a, b) in alone[0].as_f32().unwrap().iter().zip(rows) {
            let error = f64::from((a - b).abs() / b.abs().max(1.0));
            assert!(error <= TOLERANCE, "{a} and {b}");
        }
        rows = &rows[ids.len() * VOCABULARY..];
    }
}

#[test]
fn runs_at_once_compute_what_one_computes() {
    let decoder = decoder(false);
    let session = whole(&decoder);
    let batches = [tokens(&BATCH), tokens(&[&[1]]), tokens(&[&[2, 3, 4], &[5]])];
    let run = |ids: &Tensor| session.run(&[("input_ids", ids)], &["logits"]).unwrap();
    let want: Vec<_> = batches.iter().map(run).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let got: Vec<_> = batches.iter().map(run).collect();
                    assert_eq!(got, want);
                }
            });
        }
    });
}

#[test]
fn bad_inputs_are_named() {
    let decoder = decoder(false);
    let session = whole(&decoder);
    let check = |inputs: &[(&str, &Tensor)], outputs: &[&str], expect: &str| {
        let error = session.run(inputs, outputs).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}, expected {expect}");
    };
    let ids = |rows: &[&[i64]], expect: &str| check(&[("input_ids", &tokens(rows))], &["logits"], expect);
    ids(&[&[1, 17]], "17 at position 1 of sequence 0");
    ids(&[&[1], &[0, -2]], "-2 at position 1 of sequence 1");
    ids(&[&[1, -1, 3]], "3 at position 2 of sequence 0");
    ids(&[&[1, 2], &[-1, -1]], "none in sequence 1");
    ids(&[&[]], "none in sequence 0");
    ids(&[&[1; 10]], "at most 9 positions");
    let good = tokens(&[&[1, 2]]);
    let row = |rows, width| Tensor::f32(vec![rows, width], vec![0.0; rows * width]).unwrap();
    check(&[("input_ids", &row(2, 2))], &["logits"], "tensor `input_ids`: expected int64");
    check(&[("input_ids", &good), ("x3", &row(3, HIDDEN))], &["x4"], "tensor `x3`: expected 2 tokens");
    check(&[("x3", &row(3, 5))], &["x4"], "tensor `x3`: expected f32 [rows, 12], found float [3, 5]");
    check(&[("x3", &good)], &["x4"], "tensor `x3`: expected f32 [rows, 12], found int64 [1, 2]");
    check(&[("x3", &row(2, HIDDEN))], &["logits", "x1"], "tensor `input_ids`: expected it among");
    check(&[("y", &good)], &["logits"], "tensor `y`: expected it among");
    check(&[("input_ids", &good)], &["y"], "tensor `y`: expected it among");
    let lengths = |values: Vec<i64>| Tensor::new(vec![values.len()], Data::I64(values)).unwrap();
    let (x1, qkv) = (row(3, HIDDEN), row(3, 24));
    for bad in [vec![1, 1], vec![4, -1], vec![3, 0], vec![i64::MAX, i64::MAX]] {
        check(&[("x1", &x1), ("qkv.out", &qkv), ("lengths", &lengths(bad))], &["x2"], "tensor `lengths`");
    }
    session
        .run(&[("x1", &x1), ("qkv.out", &qkv), ("lengths", &lengths(vec![2, 1]))], &["x2"])
        .expect("lengths that fit");
    let (weights, expert) = (row(2, EXPERTS), row(1, HIDDEN));
    let experts =
        [("weights", &weights), ("e0.down.out", &expert), ("e1.down.out", &expert), ("e2.down.out", &expert)];
    check(&experts, &["x4"], "tensor `e0.down.out`: expected 0 rows");
    check(
        &[("x0", &row(2, HIDDEN)), ("o.out", &row(3, HIDDEN))],
        &["x1"],
        "tensor `o.out`: expected 2 tokens",
    );
}

#[test]
fn a_run_without_sequences_is_empty() {
    let empty = Tensor::new(vec![0, 4], Data::I64(Vec::new())).unwrap();
    let outputs = whole(&decoder(false)).run(&[("input_ids", &empty)], &["logits", "lengths"]).unwrap();
    assert_eq!((outputs[0].shape.as_slice(), outputs[1].len()), (&[0, VOCABULARY][..], 0));
}

#[test]
fn bad_constants_and_graphs_are_named() {
    let good = decoder(false);
    let all: Vec<usize> = (0..good.nodes.len()).collect();
    let refuse = |decoder: &Decoder, nodes: &[usize], spoil: &dyn Fn(&str) -> Option<Tensor>| {
        let mut constants =
            |name: &str| Ok(spoil(name).unwrap_or_else(|| constant(name, &shape_of(decoder, name))));
        DecoderSession::load(decoder, nodes, &mut constants).unwrap_err().to_string()
    };
    let flat = |name: &str| (name == "q.weight").then(|| constant(name, &[144]));
    let error = refuse(&good, &all, &flat);
    assert_eq!(error, "tensor `q.weight`: expected float [12, 12], found float [144]");
    let integers = |name: &str| {
        (name == "n1.bias").then(|| Tensor::new(vec![HIDDEN], Data::I64(vec![0; HIDDEN])).unwrap())
    };
    let error = refuse(&good, &all, &integers);
    assert_eq!(error, "tensor `n1.bias`: expected float [12], found int64 [12]");
    let mut missing = |name: &str| Err(ExecError::Missing { name: name.to_owned() });
    let error = DecoderSession::load(&good, &[2], &mut missing).unwrap_err().to_string();
    assert!(error.starts_with("tensor `q.weight`"), "{error}");
    for nodes in [&[1, 1][..], &[2, 1], &[99]] {
        assert!(refuse(&good, nodes, &|_| None).contains("expected ascending indices"));
    }
    let spoilt = |change: &dyn Fn(&mut Decoder), expect: &str| {
        let mut decoder = good.clone();
        change(&mut decoder);
        let error = refuse(&decoder, &[], &|_| None);
        assert!(error.contains(expect), "{error}, expected {expect}");
    };
    spoilt(&|d| d.nodes[7].inputs[0] = "k.out".into(), "node `o` (Linear): `k.out` is 6 wide, expected 12");
    spoilt(&|d| d.nodes[8].inputs[1] = "k.out".into(), "node `add` (Add): `k.out` is 6 wide");
    spoilt(&|d| d.nodes[6].inputs[3] = "x0".into(), "node `attend` (Attend): its last input is");
    spoilt(&|d| d.nodes[1].inputs[0] = "lengths".into(), "node `n0` (Norm): `lengths` is Lengths");
    spoilt(&|d| d.nodes[1].inputs[0] = "nowhere".into(), "reads `nowhere`, which no node before it writes");
    spoilt(&|d| d.hidden = 0, "node `embed` (Embed): hidden is 0");
    spoilt(&|d| d.nodes[1].outputs.clear(), "1 inputs and 0 outputs");
    let combine = good.nodes.len() - 3;
    spoilt(&|d| d.nodes[combine].inputs.swap(1, 2), "node `combine` (Combine): `e1.down.out` has rows of");
}

#[test]
fn a_segment_holds_the_weights_of_its_nodes() {
    let mut decoder = decoder(false);
    assert_eq!(load(&decoder, &[2, 3]).bytes(), (12 * 12 + 12 + 6 * 12) * 4);
    assert_eq!(load(&decoder, &[6]).bytes(), 0);
    // A head tied to the embedding: one is read by rows, the other by columns.
    let head = decoder.nodes.len() - 2;
    let Op::Linear(linear) = &mut decoder.nodes[head].op else { unreachable!("the head") };
    linear.weight = "embed".into();
    let tied = load(&decoder, &[0, head]);
    assert_eq!(tied.bytes(), (2 * VOCABULARY * HIDDEN + (2 + 9) * HIDDEN) * 4);
}
