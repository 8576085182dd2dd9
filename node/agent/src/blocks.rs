//! A decoder in pieces that one tensor connects, so that they can be run one after the other for all samples.
//!
//! Not here: the stages of a job (`halfstep_model::cut`), which need the inputs of layers.

use halfstep_model::decoder::{Decoder, LENGTHS, Op, TOKENS};
use std::collections::BTreeMap;
use std::ops::Range;

/// Consecutive nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    /// Of the decoder.
    pub(crate) nodes: Range<usize>,
    /// The tensor it reads, written by the block before; `None` for the first, which reads the tokens.
    pub(crate) reads: Option<String>,
    /// Whether it reads the lengths too.
    pub(crate) reads_lengths: bool,
    /// The tensor that lives on.
    pub(crate) writes: String,
}

/// The blocks of a decoder; the last is its head: the last linear operator and what follows.
///
/// # Errors
/// A sentence if the head reads more than one tensor.
pub(crate) fn blocks(decoder: &Decoder) -> Result<Vec<Block>, String> {
    let head = decoder.nodes.iter().rposition(|node| matches!(node.op, Op::Linear(_)));
    let head = head.filter(|head| *head > 0).ok_or("the model has no head after its embedding")?;
    let mut last_read = BTreeMap::new();
    for (index, node) in decoder.nodes.iter().enumerate() {
        last_read.extend(node.inputs.iter().map(|name| (name.as_str(), index)));
    }
    let (mut blocks, mut start, mut live) = (Vec::<Block>::new(), 0, Vec::<&str>::new());
    for (index, node) in decoder.nodes[..head].iter().enumerate() {
        live.extend(
            node.outputs.iter().map(String::as_str).filter(|name| !matches!(*name, LENGTHS | TOKENS)),
        );
        live.retain(|name| last_read.get(name).is_some_and(|last| *last > index));
        if let [only] = live[..] {
            blocks.push(block(decoder, start..index + 1, blocks.last(), only));
            start = index + 1;
        }
    }
    if start != head {
        return Err(format!("the model's head `{}` reads more than one tensor", decoder.nodes[head].name));
    }
    let logits = decoder.nodes.last().and_then(|node| node.outputs.first()).cloned().unwrap_or_default();
    blocks.push(block(decoder, head..decoder.nodes.len(), blocks.last(), &logits));
    Ok(blocks)
}

fn block(decoder: &Decoder, nodes: Range<usize>, before: Option<&Block>, writes: &str) -> Block {
    let reads_lengths =
        decoder.nodes[nodes.clone()].iter().any(|node| node.inputs.iter().any(|name| name == LENGTHS));
    Block { nodes, reads: before.map(|block| block.writes.clone()), reads_lengths, writes: writes.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_model::decoder::{DescribeOptions, describe};

    #[test]
    fn one_tensor_leads_from_block_to_block() {
        let config = serde_json::json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "vocab_size": 10,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16,
            "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "tie_word_embeddings": true
        });
        let decoder = describe(&config, DescribeOptions::default()).unwrap();
        let blocks = blocks(&decoder).unwrap();
        // The embedding, attention and MLP of each layer, the last norm, the head.
        assert_eq!(blocks.len(), 1 + 2 * 2 + 1 + 1);
        assert_eq!(blocks.iter().filter(|block| block.reads_lengths).count(), 2);
        for pair in blocks.windows(2) {
            assert_eq!(pair[0].nodes.end, pair[1].nodes.start);
            assert_eq!(pair[1].reads.as_ref(), Some(&pair[0].writes));
        }
        let head = &decoder.nodes[blocks[6].nodes.clone()];
        assert!(matches!(head, [node] if matches!(node.op, Op::Linear(_))), "{head:?}");
    }
}
