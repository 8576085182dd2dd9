//! Decoders that CUDA devices have no kernel for: known from the graph alone, before any work.
//!
//! Not here: running them elsewhere (`agent`).

use halfstep_compute::decoder::{EXPERTS_MAX, HEAD_WIDTH_MAX};
use halfstep_model::decoder::{Attend, Decoder, Op};

/// Why no CUDA device can run a decoder; nothing if they can.
pub fn without_kernel(decoder: &Decoder) -> Option<String> {
    decoder.nodes.iter().find_map(|node| match &node.op {
        Op::Attend(Attend { head_dim, .. }) if *head_dim > HEAD_WIDTH_MAX => Some(format!(
            "`{}` has heads of {head_dim} numbers, kernels take at most {HEAD_WIDTH_MAX}",
            node.name
        )),
        Op::Route(route) if route.experts > EXPERTS_MAX => {
            Some(format!("`{}` has {} experts, kernels take at most {EXPERTS_MAX}", node.name, route.experts))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_model::decoder::{DescribeOptions, Route, describe};

    #[test]
    fn wide_heads_and_many_experts_are_named() {
        let config = serde_json::json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "vocab_size": 10,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
            "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "tie_word_embeddings": true
        });
        let mut decoder = describe(&config, DescribeOptions::default()).unwrap();
        assert_eq!(without_kernel(&decoder), None, "heads of 256");
        let attend = decoder.nodes.iter_mut().find(|node| matches!(node.op, Op::Attend(_))).unwrap();
        attend.name = "attention".into();
        if let Op::Attend(attend) = &mut attend.op {
            attend.head_dim += 1;
        }
        let why = without_kernel(&decoder).unwrap();
        assert_eq!(why, "`attention` has heads of 257 numbers, kernels take at most 256");
        decoder.nodes.retain(|node| !matches!(node.op, Op::Attend(_)));
        decoder.nodes[0].op = Op::Route(Route { experts: 1024, top_k: 1, normalise: true });
        assert_eq!(without_kernel(&decoder), None);
        decoder.nodes[0].op = Op::Route(Route { experts: 1025, top_k: 1, normalise: true });
        assert!(without_kernel(&decoder).unwrap().ends_with("has 1025 experts, kernels take at most 1024"));
    }
}
