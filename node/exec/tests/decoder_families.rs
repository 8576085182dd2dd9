//! Decoders of every family against what `transformers` computed (`common/model/tests/decoders/make.py`): logits,
//! the input of every product, and what routers chose.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod decoders;

use decoders::{Golden, RELATIVE_ERROR_MAX, cases, folder, open, relative_error, values};
use halfstep_exec::{DecoderSession, ExecError, Session};
use halfstep_model::decoder::{Attend, DescribeOptions, Gating, LOGITS, NormKind, Op, Rotation, TOKENS};
use halfstep_model::{Tensor, cut};
use std::collections::BTreeMap;

fn session(golden: &Golden, nodes: &[usize]) -> DecoderSession {
    let mut constants =
        |name: &str| -> Result<Tensor, ExecError> { Ok(golden.checkpoint.tensor(name).unwrap()) };
    DecoderSession::load(&golden.decoder, nodes, &mut constants).unwrap()
}

#[test]
fn logits_and_every_tapped_input_are_those_of_transformers() {
    let mut wrong = Vec::new();
    for case in cases() {
        let golden = open(&case, DescribeOptions::default());
        let all: Vec<usize> = (0..golden.decoder.nodes.len()).collect();
        let names: Vec<&str> = golden.expected.keys().map(String::as_str).collect();
        let outputs = session(&golden, &all).run(&[(TOKENS, &golden.tokens)], &names).unwrap();
        let mut largest = 0f64;
        for (ours, (name, theirs)) in outputs.iter().zip(&golden.expected) {
            let subject = format!("{}: {name}", golden.name);
            let error = relative_error(ours, theirs, &subject);
            largest = largest.max(error);
            if error.is_nan() || error >= RELATIVE_ERROR_MAX {
                wrong.push(format!("{subject}: relative error {error:.1e}"));
            }
        }
        println!("{}: {} tensors, largest relative error {largest:.1e}", golden.name, names.len());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

type Mutation = (&'static str, fn(&mut Op));

fn attend(op: &mut Op, change: impl FnOnce(&mut Attend)) {
    if let Op::Attend(attend) = op {
        change(attend);
    }
}

fn rotation(op: &mut Op) -> Option<&mut Rotation> {
    match op {
        Op::Attend(Attend { rotary: Some(rotary), .. }) => Some(&mut rotary.rotation),
        _ => None,
    }
}

/// Facts of a family that a decoder could have wrong.
fn mutations() -> Vec<Mutation> {
    vec![
        ("no window", |op| attend(op, |attend| attend.window = None)),
        ("a window one wider", |op| {
            attend(op, |attend| attend.window = attend.window.map(|window| window + 1));
        }),
        ("no softcap of scores", |op| attend(op, |attend| attend.softcap = None)),
        ("another scale", |op| attend(op, |attend| attend.scale *= 1.01)),
        ("no rotation", |op| attend(op, |attend| attend.rotary = None)),
        ("always the short frequencies", |op| {
            if let Some(Rotation::ByLength { after, .. } | Rotation::Dynamic { after, .. }) = rotation(op) {
                *after = 1000;
            }
        }),
        ("no factor of sine and cosine", |op| {
            if let Some(Rotation::ByLength { factor, .. } | Rotation::Fixed { factor, .. }) = rotation(op) {
                *factor = 1.0;
            }
        }),
        ("another function", |op| {
            if let Op::Gate(gating) | Op::Activate(gating) = op {
                *gating = if *gating == Gating::Relu { Gating::Silu } else { Gating::Relu };
            }
        }),
        ("another offset of norms", |op| {
            if let Op::Norm(norm) = op {
                match norm.kind {
                    NormKind::Rms => norm.kind = NormKind::RmsUnitOffset,
                    NormKind::RmsUnitOffset => norm.kind = NormKind::Rms,
                    NormKind::Layer => norm.epsilon = 0.1,
                }
            }
        }),
        ("no softcap of logits", |op| {
            if let Op::Softcap { cap } = op {
                *cap = 1e6;
            }
        }),
        ("an embedding that is not scaled", |op| {
            if let Op::Embed(embed) = op {
                embed.scale = 1.0;
            }
        }),
        ("no bias", |op| {
            if let Op::Linear(linear) = op {
                linear.bias = None;
            }
        }),
        ("normalised or not", |op| {
            if let Op::Route(route) = op {
                route.normalise = !route.normalise;
            }
        }),
        ("one expert more", |op| {
            if let Op::Route(route) = op {
                route.top_k += 1;
            }
        }),
    ]
}

/// A golden that would not notice a wrong fact proves nothing about it.
#[test]
fn goldens_notice_every_fact_that_is_changed() {
    for (what, mutate) in mutations() {
        let mut changed = 0;
        for case in cases() {
            let mut golden = open(&case, DescribeOptions::default());
            let original = golden.decoder.clone();
            golden.decoder.nodes.iter_mut().for_each(|node| mutate(&mut node.op));
            if golden.decoder == original {
                continue;
            }
            changed += 1;
            let all: Vec<usize> = (0..golden.decoder.nodes.len()).collect();
            let outputs = session(&golden, &all).run(&[(TOKENS, &golden.tokens)], &[LOGITS]).unwrap();
            let error = relative_error(&outputs[0], &golden.expected[LOGITS], &golden.name);
            assert!(error > 5.0 * RELATIVE_ERROR_MAX, "{}: {what}: only {error:.1e}", golden.name);
        }
        assert!(changed > 0, "{what}: in no golden");
    }
}

/// The golden's tensors, computed segment by segment from the carry alone.
#[test]
fn segments_one_after_the_other_compute_the_same_bits_as_the_whole() {
    for case in cases() {
        let golden = open(&case, DescribeOptions::default());
        let (layers, _) = golden.decoder.layers();
        let cut = cut(&golden.decoder, &layers, &vec![true; layers.len()]).unwrap();
        let all: Vec<usize> = (0..golden.decoder.nodes.len()).collect();
        let whole = session(&golden, &all);
        let mut carry = BTreeMap::from([(TOKENS.to_owned(), golden.tokens.clone())]);
        for segment in &cut.segments {
            let inputs: Vec<(&str, &Tensor)> =
                segment.inputs.iter().map(|name| (name.as_str(), &carry[name])).collect();
            let names: Vec<&str> = segment.outputs.iter().map(String::as_str).collect();
            let outputs = session(&golden, &segment.nodes).run(&inputs, &names).unwrap();
            let expected = whole.run(&[(TOKENS, &golden.tokens)], &names).unwrap();
            for ((name, ours), theirs) in names.iter().zip(outputs).zip(expected) {
                assert!(ours.data == theirs.data, "{}: {name}", golden.name);
                carry.insert((*name).to_owned(), ours);
            }
            carry.retain(|name, _| segment.live_after.contains(name));
        }
    }
}

/// Other weights before the router would choose otherwise; with the original's choice given they must not.
#[test]
fn a_shared_choice_replaces_the_segments_own() {
    let golden = open(&folder().join("mixtral"), DescribeOptions::default());
    let (layers, _) = golden.decoder.layers();
    let cut = cut(&golden.decoder, &layers, &vec![true; layers.len()]).unwrap();
    let segment = cut.segments.iter().find(|segment| !segment.shared.is_empty()).unwrap();
    let chosen = &segment.shared[0];
    let theirs = &golden.expected[chosen];
    let experts = theirs.shape[1];
    // Everything to the last expert.
    let last: Vec<f32> =
        (0..values(theirs).len()).map(|i| f32::from(u8::from(i % experts == experts - 1))).collect();
    let last = Tensor::f32(theirs.shape.to_vec(), last).unwrap();
    let all: Vec<usize> = (0..golden.decoder.nodes.len()).collect();
    let selected: Vec<&str> = golden
        .decoder
        .nodes
        .iter()
        .filter(|node| matches!(node.op, Op::Select(_)) && node.inputs[1] == *chosen)
        .map(|node| node.outputs[0].as_str())
        .collect();
    let inputs = [(TOKENS, &golden.tokens), (chosen.as_str(), &last)];
    let rows: Vec<usize> = session(&golden, &all)
        .run(&inputs, &selected)
        .unwrap()
        .iter()
        .map(|tensor| tensor.shape[0])
        .collect();
    assert_eq!(rows, [0, 0, 0, theirs.shape[0]]);
}

#[test]
fn experts_that_get_every_token_do_not_change_what_the_model_computes() {
    for case in cases() {
        let golden = open(&case, DescribeOptions { calibrate_all_experts: true });
        let all: Vec<usize> = (0..golden.decoder.nodes.len()).collect();
        let outputs = session(&golden, &all).run(&[(TOKENS, &golden.tokens)], &[LOGITS]).unwrap();
        let error = relative_error(&outputs[0], &golden.expected[LOGITS], &golden.name);
        assert!(error < RELATIVE_ERROR_MAX, "{}: relative error {error:.1e}", golden.name);
    }
}
