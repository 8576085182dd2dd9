//! Every golden decoder of `decoders/`, without running it: from its configuration to the stages of its layers.
//! What they compute is compared in exec's `decoder_families.rs`.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use halfstep_model::checkpoint::Checkpoint;
use halfstep_model::decoder::{CarryPrecision, Decoder, DecoderProgram, DescribeOptions, Op, describe};
use halfstep_model::{Layer, cut};
use halfstep_quant::ScaleType;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/decoders");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> = entries.filter(|path| path.join("config.json").exists()).collect();
    cases.sort();
    assert_eq!(cases.len(), 23);
    cases
}

fn described(case: &Path) -> Decoder {
    let checkpoint = Checkpoint::open(case).unwrap();
    let decoder = describe(checkpoint.config(), DescribeOptions::default()).unwrap();
    decoder.bind(|name| checkpoint.info(name).map(|info| info.shape.clone())).unwrap()
}

#[test]
fn every_tensor_of_a_checkpoint_is_read_and_nothing_else() {
    for case in cases() {
        let checkpoint = Checkpoint::open(&case).unwrap();
        let decoder = described(&case);
        let read: BTreeSet<&str> =
            decoder.nodes.iter().flat_map(|node| node.op.constants(&decoder)).map(|one| one.0).collect();
        let stored: BTreeSet<&str> = checkpoint.names().collect();
        assert_eq!(read, stored, "{}", case.display());
    }
}

#[test]
fn configurations_of_transformers_4_describe_the_same_decoder() {
    let mut compared = 0;
    for case in cases() {
        let Ok(old) = std::fs::read(case.join("old.json")) else { continue };
        let old = describe(&serde_json::from_slice(&old).unwrap(), DescribeOptions::default()).unwrap();
        assert!(old == described(&case), "{}", case.display());
        compared += 1;
    }
    assert_eq!(compared, 19);
}

#[test]
fn a_decoder_arrives_as_it_was_sent() {
    for case in cases() {
        arrives(described(&case));
    }
}

/// Where a layer belongs: products into the attention of block 0, out of it, into its MLP, out of that; block 1.
fn stage(layer: &Layer) -> usize {
    const ROLES: [&[&str]; 4] = [
        &["q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"],
        &["o_proj", "out_proj", "attn.c_proj"],
        &["gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "w1", "w3"],
        &["down_proj", "mlp.c_proj", "fc2", "w2"],
    ];
    let role =
        ROLES.iter().position(|names| names.iter().any(|name| layer.name.ends_with(&format!(".{name}"))));
    let block = layer.name.split('.').find_map(|part| part.parse::<usize>().ok());
    4 * block.unwrap() + role.unwrap()
}

#[test]
fn stages_are_the_four_steps_of_each_block() {
    for case in cases() {
        let decoder = described(&case);
        decoder.validate().unwrap();
        let (layers, kept) = decoder.layers();
        assert!(kept.iter().any(|k| k.name == "lm_head" && k.reason.contains("head")));
        let cut = cut(&decoder, &layers, &vec![true; layers.len()]).unwrap();
        for (at, segment) in cut.segments.iter().enumerate() {
            let expected: Vec<usize> =
                layers.iter().enumerate().filter(|(_, layer)| stage(layer) == at).map(|(i, _)| i).collect();
            assert!(!expected.is_empty(), "{}: stage {at}", case.display());
            assert_eq!(segment.decided, expected, "{}: stage {at}", case.display());
            assert_eq!(segment.taps.len(), expected.len());
        }
        assert_eq!(cut.segments.len(), 1 + layers.iter().map(stage).max().unwrap());
    }
}

#[test]
fn what_routers_choose_is_shared_from_its_segment_to_the_end_of_the_block() {
    let mut routers = 0;
    for case in cases() {
        let decoder = described(&case);
        let (layers, _) = decoder.layers();
        let cut = cut(&decoder, &layers, &vec![true; layers.len()]).unwrap();
        for segment in &cut.segments {
            let written = segment.nodes.iter().map(|node| &decoder.nodes[*node]);
            let routed: Vec<String> = written
                .filter(|node| matches!(node.op, Op::Route(_)))
                .map(|node| node.outputs[0].clone())
                .collect();
            assert_eq!(segment.shared, routed, "{}", case.display());
            assert!(routed.iter().all(|name| segment.outputs.contains(name)));
            routers += routed.len();
        }
    }
    assert_eq!(routers, 5, "two of Mixtral, two and one of Qwen3-MoE");
}

#[test]
fn all_tokens_reach_all_experts_if_asked() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/decoders/mixtral");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    for asked in [false, true] {
        let decoder =
            describe(checkpoint.config(), DescribeOptions { calibrate_all_experts: asked }).unwrap();
        let told: BTreeSet<bool> = decoder
            .nodes
            .iter()
            .filter_map(|node| match &node.op {
                Op::Select(select) => Some(select.all_tokens),
                Op::Combine { all_tokens } => Some(*all_tokens),
                _ => None,
            })
            .collect();
        assert_eq!(told, BTreeSet::from([asked]));
    }
}

/// Values that no configuration should have in most places.
fn nonsense() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(3),
        json!(1e-300),
        json!(1e-30),
        json!(1e38),
        json!(u64::MAX),
        json!(1_000_000),
        json!(""),
        json!("relu"),
        json!("yarn"),
        json!([]),
        json!([1e-40, 1e39]),
        json!({}),
        json!({"rope_type": "linear", "factor": 1e-38}),
        json!({"rope_type": "yarn", "factor": 1e30, "rope_theta": 1e-30}),
        json!({"rope_type": "dynamic", "factor": 1e38}),
        json!({"rope_type": "llama3", "factor": 1e-38, "low_freq_factor": 1, "high_freq_factor": 4}),
    ]
}

/// Every field of every golden, absent or replaced: refused, or a decoder that is valid and arrives as it was sent.
#[test]
fn any_field_may_be_absurd() {
    let (mut refused, mut described) = (0, 0);
    for case in cases() {
        let config = Checkpoint::open(&case).unwrap().config().clone();
        let fields: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for field in fields.iter().map(String::as_str).chain(["rope_scaling", "head_dim", "layer_types"]) {
            for value in nonsense().into_iter().map(Some).chain([None]) {
                let mut changed = config.clone();
                let object = changed.as_object_mut().unwrap();
                match value {
                    Some(value) => object.insert(field.to_owned(), value),
                    None => object.remove(field),
                };
                match describe(&changed, DescribeOptions::default()) {
                    Err(error) => {
                        assert!(!error.to_string().contains('\n'));
                        refused += 1;
                    }
                    Ok(decoder) => {
                        arrives(decoder);
                        described += 1;
                    }
                }
            }
        }
    }
    println!("{refused} refused, {described} described");
    assert!(refused > 1000 && described > 1000, "{refused} refused, {described} described");
}

fn arrives(decoder: Decoder) {
    let program = DecoderProgram {
        decoder,
        carries: CarryPrecision::F32,
        factors: CarryPrecision::Bf16,
        scales: ScaleType::default(),
    };
    assert!(DecoderProgram::from_bytes(&program.to_bytes().unwrap()).unwrap() == program);
}
