//! Configurations that are understood and those that are refused.

use super::*;
use crate::decoder::{Attend, Op, Rotation};
use serde_json::json;

fn llama(changes: Value) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128,
    });
    change(&mut config, changes);
    config
}

fn change(config: &mut Value, changes: Value) {
    let Value::Object(changes) = changes else { panic!("changes are an object") };
    for (name, value) in changes {
        match value == json!("absent") {
            true => config.as_object_mut().unwrap().remove(&name),
            false => config.as_object_mut().unwrap().insert(name, value),
        };
    }
}

fn attends(config: &Value) -> Vec<Attend> {
    let decoder = describe(config, DescribeOptions::default()).unwrap();
    let attends = decoder.nodes.into_iter().filter_map(|node| match node.op {
        Op::Attend(attend) => Some(attend),
        _ => None,
    });
    attends.collect()
}

#[test]
fn sequences_end_where_positions_do_unless_the_rotation_grows() {
    let longest = |changes| describe(&llama(changes), DescribeOptions::default()).unwrap().longest();
    let scaled = |kind: &str| longest(json!({"rope_scaling": {"type": kind, "factor": 2.0}}));
    assert_eq!((longest(json!({})), scaled("linear"), scaled("dynamic")), (Some(128), Some(128), None));
}

#[test]
fn what_is_not_understood_is_refused_by_one_sentence_that_names_the_field() {
    let cases = [
        (json!({"model_type": "falcon"}), "model type `falcon` is not known, expected one of llama, mistral"),
        (json!({"model_type": "absent"}), "config field `model_type`: expected one of llama"),
        (json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), "already quantized by `gptq`"),
        (
            json!({"num_attention_heads": 0}),
            "`num_attention_heads`: expected a whole number from 1 to 16384, found 0",
        ),
        (
            json!({"num_attention_heads": 5}),
            "`num_attention_heads`: expected a divisor of the width, 32, found 5",
        ),
        (json!({"num_key_value_heads": 3}), "`num_key_value_heads`: expected a divisor of 4 heads, found 3"),
        (
            json!({"num_attention_heads": 16384, "head_dim": 16384, "num_key_value_heads": 1}),
            "`head_dim`: expected at most 64 for",
        ),
        (
            json!({"hidden_size": "absent"}),
            "`hidden_size`: expected a whole number from 1 to 1048576, found nothing",
        ),
        (
            json!({"hidden_size": "wide"}),
            "`hidden_size`: expected a whole number from 1 to 1048576, found \"wide\"",
        ),
        (
            json!({"num_hidden_layers": 1_000_000_000}),
            "`num_hidden_layers`: expected a whole number from 1 to 1024",
        ),
        (json!({"vocab_size": -1}), "`vocab_size`"),
        (json!({"hidden_act": "mish"}), "`hidden_act`: expected silu, gelu"),
        (json!({"rms_norm_eps": 0.0}), "`rms_norm_eps`: expected a positive number, found 0.0"),
        (json!({"rope_scaling": {"type": "mrope"}}), "`rope_scaling.type`: expected default, linear"),
        (
            json!({"rope_parameters": {"rope_type": "linear"}}),
            "`rope_parameters.factor`: expected a positive number, found nothing",
        ),
        (
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
            "`rope_parameters.partial_rotary_factor`: expected 1",
        ),
        (
            json!({"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}),
            "`rope_scaling.short_factor`: expected 4 positive",
        ),
        (json!({"head_dim": 7}), "`partial_rotary_factor`: expected a part of heads of 7 that is even"),
        (
            json!({"model_type": "qwen3", "layer_types": ["full_attention"]}),
            "`layer_types`: expected 2 texts",
        ),
        (
            json!({"model_type": "gemma3_text", "use_bidirectional_attention": true}),
            "`use_bidirectional_attention`: expected false",
        ),
        (
            json!({"model_type": "opt", "word_embed_proj_dim": 16, "ffn_dim": 8}),
            "`word_embed_proj_dim`: expected the width, 32",
        ),
        (
            json!({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}),
            "`num_experts_per_tok`: expected a whole number from 1 to 4, found 5",
        ),
        (
            json!({"model_type": "mixtral", "num_local_experts": 1024, "num_hidden_layers": 1024}),
            "`num_local_experts`: expected at most 32 for 1024 layers",
        ),
    ];
    for (changes, expected) in cases {
        let config = llama(changes);
        let refused = describe(&config, DescribeOptions::default());
        let sentence = refused.expect_err(&format!("{config}")).to_string();
        assert!(sentence.contains(expected), "{config}: {sentence}");
        assert!(!sentence.contains('\n'));
    }
    assert!(describe(&json!([1]), DescribeOptions::default()).is_err());
}

#[test]
fn rotations_of_old_and_new_files_are_the_same() {
    let pairs = [
        (
            json!({"rope_theta": 500.0}),
            json!({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        ),
        (
            json!({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
            json!({"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}}),
        ),
    ];
    for (old, new) in pairs {
        assert_eq!(attends(&llama(old)), attends(&llama(new)));
    }
}

#[test]
fn windows_are_on_the_layers_that_the_family_says() {
    let cases = [
        (json!({"sliding_window": 7}), [None, None]),
        (json!({"model_type": "mistral", "sliding_window": 7}), [Some(7), Some(7)]),
        (json!({"model_type": "mistral", "sliding_window": null}), [None, None]),
        (json!({"model_type": "mistral"}), [Some(4096), Some(4096)]),
        (json!({"model_type": "qwen2", "sliding_window": 7, "max_window_layers": 0}), [None, None]),
        (
            json!({"model_type": "qwen2", "sliding_window": 7, "max_window_layers": 1, "use_sliding_window": true}),
            [None, Some(7)],
        ),
        (json!({"model_type": "gemma2", "sliding_window": 7}), [Some(7), None]),
        (
            json!({"model_type": "gemma3_text", "sliding_window": 7, "sliding_window_pattern": 2}),
            [Some(7), None],
        ),
        (json!({"model_type": "gemma3_text", "sliding_window": 7}), [Some(7), Some(7)]),
        (
            json!({"model_type": "gemma3_text", "sliding_window": 7,
                   "layer_types": ["full_attention", "sliding_attention"]}),
            [None, Some(7)],
        ),
    ];
    for (changes, expected) in cases {
        let config = llama(changes);
        let windows: Vec<Option<usize>> = attends(&config).iter().map(|attend| attend.window).collect();
        assert_eq!(windows, expected, "{config}");
    }
}

#[test]
fn the_embeddings_scale_has_the_element_type_of_the_checkpoint() {
    // sqrt(3584) = 59.8665..., in steps of 1/4 (bfloat16) and 1/32 (float16).
    let cases = [("bfloat16", 59.75), ("float16", 59.875), ("float32", 3584f32.sqrt())];
    for (dtype, expected) in cases {
        for field in ["dtype", "torch_dtype"] {
            let config = llama(json!({"model_type": "gemma2", "hidden_size": 3584, field: dtype}));
            let decoder = describe(&config, DescribeOptions::default()).unwrap();
            let Op::Embed(embed) = &decoder.nodes[0].op else { panic!("the first node embeds") };
            assert_eq!(embed.scale, expected, "{dtype}");
        }
    }
}

#[test]
fn gemma_3_rotates_local_layers_by_their_own_base() {
    let first = |attend: &Attend| match &attend.rotary.as_ref().unwrap().rotation {
        Rotation::Fixed { frequencies, .. } => frequencies[1],
        other => panic!("{other:?}"),
    };
    let head = json!({"model_type": "gemma3_text", "head_dim": 4, "sliding_window_pattern": 2});
    let old = json!({"rope_theta": 1e4, "rope_local_base_freq": 1e2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
    let new = json!({"rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    }});
    for rope in [old, new] {
        let mut config = llama(head.clone());
        change(&mut config, rope);
        let attends = attends(&config);
        assert_eq!([first(&attends[0]), first(&attends[1])], [0.1, 0.00125]);
    }
}

#[test]
fn names_are_fitted_to_checkpoints_without_the_first_part_and_shapes_are_checked() {
    let config = json!({
        "model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16, "vocab_size": 10,
    });
    let decoder = describe(&config, DescribeOptions::default()).unwrap();
    let constants = |decoder: &Decoder| -> std::collections::BTreeMap<String, Vec<usize>> {
        let all = decoder.nodes.iter().flat_map(|node| node.op.constants(decoder));
        all.map(|(name, shape)| (name.to_owned(), shape)).collect()
    };
    let stored = constants(&decoder);
    assert!(stored.contains_key("transformer.h.0.attn.c_attn.weight"));
    assert_eq!(decoder.clone().bind(|name| stored.get(name).cloned()).unwrap(), decoder);

    let without = |name: &str| stored.get(&format!("transformer.{name}")).cloned();
    let bound = decoder.clone().bind(without).unwrap();
    assert!(constants(&bound).contains_key("h.0.attn.c_attn.weight"));

    let missing = decoder.clone().bind(|name| stored.get(name).filter(|_| !name.contains("c_fc")).cloned());
    assert_eq!(
        missing.unwrap_err().to_string(),
        "tensor `transformer.h.0.mlp.c_fc.weight`: expected shape [8, 32], found no tensor of that name"
    );
    let turned = decoder.bind(|name| stored.get(name).map(|shape| shape.iter().rev().copied().collect()));
    assert_eq!(
        turned.unwrap_err().to_string(),
        "tensor `transformer.wte.weight`: expected shape [10, 8], found shape [8, 10]"
    );
}

#[test]
fn fused_experts_are_refused_by_name() {
    let config = llama(json!({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}));
    let decoder = describe(&config, DescribeOptions::default()).unwrap();
    let own = decoder.clone();
    let shapes: std::collections::BTreeMap<&str, Vec<usize>> =
        own.nodes.iter().flat_map(|node| node.op.constants(&own)).collect();
    let stored = |name: &str| match name {
        "model.layers.0.mlp.experts.gate_up_proj" => Some(vec![2, 96, 32]),
        name if name.contains(".experts.") => None,
        name => shapes.get(name).cloned(),
    };
    let sentence = decoder.bind(stored).unwrap_err().to_string();
    assert!(sentence.contains("fused in `model.layers.0.mlp.experts.gate_up_proj`"), "{sentence}");
}
