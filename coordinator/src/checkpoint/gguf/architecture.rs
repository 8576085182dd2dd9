//! What a decoder is called in GGUF: the architecture's numbers, and which tensor becomes which.
//!
//! All of it follows from the decoder that is executed, not from `config.json` a second time; but for the base of its
//! rotation, against which the decoder's frequencies are checked. Source: the names in llama.cpp's documentation and what
//! its loader asks for. Not here: tokens (`tokenizer`), the file (`file`).

use super::file::{Described, Kind, Value};
use crate::CoordinatorError;
use halfstep_model::Dtype;
use halfstep_model::checkpoint::{Checkpoint, TensorInfo};
use halfstep_model::decoder::{
    Attend, Decoder, DecoderNode, DescribeOptions, Gating, Linear, NormKind, Op, Rotary, Rotation, describe,
};
use std::collections::BTreeMap;

/// Families and what they are in GGUF; whether heads turn by neighbours there, and each frequency may have a divisor.
const FAMILIES: [(&str, &str, bool); 4] = [
    ("llama", "llama", true),
    ("mistral", "llama", true),
    ("qwen2", "qwen2", false),
    ("qwen3", "qwen3", false),
];

/// Modules of a block.
const MODULES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Name of the tensor of divisors of a rotation's frequencies.
const DIVISORS: &str = "rope_freqs.weight";

/// Frequencies are the same if their quotient is this near 1: f32 has about 24 digits.
const SAME: f64 = 1e-6;

/// A checkpoint in GGUF's words, before any layer is quantized.
pub(super) struct Architecture {
    /// Values of the header.
    pub(super) entries: Vec<(String, Value)>,
    /// The tensors, in the order of the file.
    pub(super) tensors: Vec<Tensor>,
    /// What a user should know.
    pub(super) notes: Vec<String>,
    /// Tokens that it has a row for.
    pub(super) vocabulary: usize,
}

/// A tensor and where it comes from.
pub(super) struct Tensor {
    pub(super) described: Described,
    pub(super) source: Source,
}

/// Contents of a tensor.
pub(super) enum Source {
    /// The tensor of that name in the checkpoint; with a number of heads, the two halves of each head's rows alternate: the
    /// llama of GGUF turns neighbours together.
    Stored { name: String, heads: Option<usize> },
    /// Computed.
    Numbers(Vec<f32>),
}

/// What the checkpoint becomes.
///
/// # Errors
/// `Configuration` naming what of it GGUF, or the reader of this architecture, has no words for; `Model`.
pub(super) fn architecture(checkpoint: &Checkpoint) -> Result<Architecture, CoordinatorError> {
    let shape = |name: &str| checkpoint.info(name).map(|info| info.shape.clone());
    let decoder = describe(checkpoint.config(), DescribeOptions::default())
        .and_then(|decoder| decoder.bind(shape))
        .map_err(|e| CoordinatorError::BadInput(format!("{}: {e}", checkpoint.folder().display())))?;
    let family = FAMILIES.iter().find(|family| family.0 == decoder.family);
    let &(_, name, alternating) = family.ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|family| family.0).collect();
        refused(format!("`{}`, expected one of {}", decoder.family, known.join(", ")))
    })?;
    let attend = decoder.nodes.iter().find_map(|node| match &node.op {
        Op::Attend(attend) => Some(attend),
        _ => None,
    });
    let attend = attend.ok_or_else(|| refused("a model without attention"))?;
    let mut describing = Describing { checkpoint, alternating, attend, tensors: Vec::new() };
    for node in &decoder.nodes {
        describing.node(&decoder, node)?;
    }
    let mut tensors = describing.tensors;
    let (entries, divisors, notes) = numbers(checkpoint, &decoder, name, alternating, attend)?;
    if let Some(divisors) = divisors {
        let described = Described { name: DIVISORS.to_owned(), kind: Kind::F32, shape: vec![divisors.len()] };
        tensors.push(Tensor { described, source: Source::Numbers(divisors) });
    }
    Ok(Architecture { entries, tensors, notes, vocabulary: decoder.vocabulary })
}

pub(super) fn refused(what: impl std::fmt::Display) -> CoordinatorError {
    CoordinatorError::Configuration(format!("gguf output has no words for {what}"))
}

struct Describing<'a> {
    checkpoint: &'a Checkpoint,
    alternating: bool,
    /// That of the first block, and so of all.
    attend: &'a Attend,
    tensors: Vec<Tensor>,
}

impl Describing<'_> {
    fn node(&mut self, decoder: &Decoder, node: &DecoderNode) -> Result<(), CoordinatorError> {
        match &node.op {
            Op::Embed(embed) if embed.scale == 1.0 && embed.positions.is_none() => {
                self.stored("token_embd.weight".into(), &embed.weight, None)
            }
            Op::Norm(norm) if norm.kind == NormKind::Rms && norm.bias.is_none() => {
                self.stored(format!("{}.weight", module(&node.name)?), &norm.weight, None)
            }
            Op::Linear(linear) if node.name == "lm_head" => match self.is_embedding(decoder, linear) {
                true => Ok(()),
                false => self.stored("output.weight".into(), &linear.weight, None),
            },
            Op::Linear(linear) if !linear.transposed => {
                let module = module(&node.name)?;
                let heads = self.heads(&module);
                self.stored(format!("{module}.weight"), &linear.weight, heads)?;
                let bias = linear.bias.as_ref();
                bias.map_or(Ok(()), |bias| self.stored(format!("{module}.bias"), bias, heads))
            }
            Op::Attend(attend) => self.attend(&node.name, attend),
            Op::Gate(Gating::Silu) | Op::Add => Ok(()),
            _ => Err(refused(format!("what `{}` computes", node.name))),
        }
    }

    fn is_embedding(&self, decoder: &Decoder, head: &Linear) -> bool {
        decoder.nodes.iter().any(|node| matches!(&node.op, Op::Embed(embed) if embed.weight == head.weight))
    }

    /// Heads whose rows alternate, of the products for queries and keys.
    fn heads(&self, module: &str) -> Option<usize> {
        match module.rsplit_once('.')?.1 {
            "attn_q" if self.alternating => Some(self.attend.heads),
            "attn_k" if self.alternating => Some(self.attend.kv_heads),
            _ => None,
        }
    }

    fn attend(&self, name: &str, attend: &Attend) -> Result<(), CoordinatorError> {
        let usual = (1.0 / (attend.head_dim as f64).sqrt()) as f32;
        if attend.softcap.is_some() || (attend.scale / usual - 1.0).abs() > SAME as f32 {
            return Err(refused(format!("softcaps and unusual factors of scores, which `{name}` has")));
        }
        match attend == self.attend {
            true => Ok(()),
            false => {
                Err(refused(format!("blocks that differ in heads, windows or rotation, as `{name}` does")))
            }
        }
    }

    fn stored(&mut self, name: String, stored: &str, heads: Option<usize>) -> Result<(), CoordinatorError> {
        let TensorInfo { dtype, shape, .. } = self.checkpoint.expect(stored)?.clone();
        let kind = match dtype {
            // Vectors are added and multiplied in single precision by all readers.
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 if shape.len() == 1 => Kind::F32,
            Dtype::F32 => Kind::F32,
            Dtype::F16 => Kind::F16,
            Dtype::Bf16 => Kind::Bf16,
            other => return Err(refused(format!("tensor `{stored}`, which holds {other}"))),
        };
        let source = Source::Stored { name: stored.to_owned(), heads };
        self.tensors.push(Tensor { described: Described { name, kind, shape }, source });
        Ok(())
    }
}

/// The module of that name in a checkpoint.
fn module(name: &str) -> Result<String, CoordinatorError> {
    if name == "model.norm" {
        return Ok("output_norm".into());
    }
    let block = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let found = block.and_then(|(index, rest)| {
        MODULES.iter().find(|known| known.0 == rest).map(|known| format!("blk.{index}.{}", known.1))
    });
    found.ok_or_else(|| refused(format!("module `{name}`")))
}

type Numbers = (Vec<(String, Value)>, Option<Vec<f32>>, Vec<String>);

/// The numbers of the header, and the divisors of frequencies where they are needed.
fn numbers(
    checkpoint: &Checkpoint,
    decoder: &Decoder,
    name: &str,
    divisible: bool,
    attend: &Attend,
) -> Result<Numbers, CoordinatorError> {
    let mut notes = Vec::new();
    let window = attend.window.filter(|window| *window < decoder.positions);
    if let Some(window) = window {
        notes.push(format!(
            "gguf: attention sees {window} tokens, which llama.cpp does not know of this architecture: the context length is \
             set to {window}, up to which there is no difference"
        ));
    }
    let blocks = decoder.nodes.iter().filter(|node| matches!(node.op, Op::Attend(_))).count();
    let rotary = attend.rotary.as_ref().ok_or_else(|| refused("attention without rotary positions"))?;
    let base = base(checkpoint);
    let (factor, divisors) = stretch(rotary, base, divisible)?;
    let own = |key: &str, value| (format!("{name}.{key}"), value);
    let mut entries = BTreeMap::from([
        own("block_count", count(blocks)?),
        own("context_length", count(window.unwrap_or(decoder.positions))?),
        own("embedding_length", count(decoder.hidden)?),
        own("feed_forward_length", count(width(decoder)?)?),
        own("vocab_size", count(decoder.vocabulary)?),
        own("attention.head_count", count(attend.heads)?),
        own("attention.head_count_kv", count(attend.kv_heads)?),
        own("attention.key_length", count(attend.head_dim)?),
        own("attention.value_length", count(attend.head_dim)?),
        own("attention.layer_norm_rms_epsilon", Value::Number(epsilon(decoder)?)),
        own("rope.dimension_count", count(rotary.width)?),
        own("rope.freq_base", Value::Number(base as f32)),
    ]);
    if let Some(factor) = factor {
        entries.insert(format!("{name}.rope.scaling.type"), Value::Text("linear".into()));
        entries.insert(format!("{name}.rope.scaling.factor"), Value::Number(factor));
    }
    // Readers look at the first value to know which others to look for.
    let general = [
        ("general.architecture".to_owned(), Value::Text(name.to_owned())),
        ("general.type".to_owned(), Value::Text("model".into())),
        ("general.quantization_version".to_owned(), Value::Count(2)),
    ];
    Ok((general.into_iter().chain(entries).collect(), divisors, notes))
}

fn count(value: usize) -> Result<Value, CoordinatorError> {
    u32::try_from(value).map(Value::Count).map_err(|_| refused(format!("a size of {value}")))
}

/// Width of the MLPs, which all have the same.
fn width(decoder: &Decoder) -> Result<usize, CoordinatorError> {
    let widths = decoder.nodes.iter().filter_map(|node| match &node.op {
        Op::Linear(linear) if node.name.ends_with(".mlp.gate_proj") => Some(linear.rows),
        _ => None,
    });
    same(widths, "MLPs of different widths")
}

fn epsilon(decoder: &Decoder) -> Result<f32, CoordinatorError> {
    let all = decoder.nodes.iter().filter_map(|node| match &node.op {
        Op::Norm(norm) => Some(norm.epsilon),
        _ => None,
    });
    same(all, "norms of different epsilons")
}

fn same<T: PartialEq>(mut values: impl Iterator<Item = T>, what: &str) -> Result<T, CoordinatorError> {
    let first = values.next().ok_or_else(|| refused(format!("{what}, or none")))?;
    if values.all(|value| value == first) { Ok(first) } else { Err(refused(what)) }
}

/// The base of the rotation, as the configuration has it; what it is used for is checked.
fn base(checkpoint: &Checkpoint) -> f64 {
    let config = checkpoint.config();
    let owners = [config.get("rope_scaling"), config.get("rope_parameters"), Some(config)];
    let stated = owners.into_iter().flatten().find_map(|owner| owner.get("rope_theta")?.as_f64());
    stated.unwrap_or(1e4)
}

/// By what positions are divided, or each frequency.
fn stretch(
    rotary: &Rotary,
    base: f64,
    divisible: bool,
) -> Result<(Option<f32>, Option<Vec<f32>>), CoordinatorError> {
    let frequencies = match &rotary.rotation {
        Rotation::Fixed { frequencies, factor: 1.0 } => frequencies,
        Rotation::Fixed { factor, .. } => {
            return Err(refused(format!("a rotation times {factor} (rope scaling `yarn`)")));
        }
        _ => {
            return Err(refused(
                "a rotation that changes with the length (rope scaling `dynamic` or `longrope`)",
            ));
        }
    };
    let plain = |i: usize| base.powf(-((2 * i) as f64) / rotary.width as f64);
    let divisors: Vec<f64> =
        frequencies.iter().enumerate().map(|(i, frequency)| plain(i) / f64::from(*frequency)).collect();
    let is = |divisor: &f64, expected: f64| (divisor / expected - 1.0).abs() < SAME;
    let first = divisors.first().copied().unwrap_or(1.0);
    match divisors.iter().all(|divisor| is(divisor, first)) {
        true if is(&first, 1.0) => Ok((None, None)),
        true => Ok((Some(first as f32), None)),
        false if divisible => Ok((None, Some(divisors.into_iter().map(|divisor| divisor as f32).collect()))),
        false => Err(refused("a rotation that is stretched unevenly, but in families llama and mistral")),
    }
}

/// Which stored row is the `i`-th of the file, for rows of heads whose halves alternate.
pub(super) fn alternate(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let head = (rows / heads.max(1)).max(2);
    (0..rows).map(move |row| {
        let (start, within) = (row / head * head, row % head);
        start + within / 2 + within % 2 * (head / 2)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_halves_of_a_head_alternate() {
        let order: Vec<usize> = alternate(12, 2).collect();
        assert_eq!(order, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }

    fn fixed(frequencies: &[f32], factor: f32) -> Rotary {
        let rotation = Rotation::Fixed { frequencies: frequencies.to_vec(), factor };
        Rotary { width: 2 * frequencies.len(), rotation }
    }

    #[test]
    fn rotations_are_plain_or_divided_or_refused() {
        let of = |rotary: &Rotary, divisible| stretch(rotary, 16.0, divisible);
        assert_eq!(of(&fixed(&[1.0, 0.25], 1.0), false).unwrap(), (None, None));
        assert_eq!(of(&fixed(&[0.5, 0.125], 1.0), false).unwrap(), (Some(2.0), None));
        assert_eq!(of(&fixed(&[1.0, 0.125], 1.0), true).unwrap(), (None, Some(vec![1.0, 2.0])));
        for (rotary, expect) in [
            (fixed(&[1.0, 0.125], 1.0), "stretched unevenly"),
            (fixed(&[1.0, 0.25], 1.5), "times 1.5"),
            (
                Rotary { width: 4, rotation: Rotation::Dynamic { after: 8, base: 16.0, scaling: 2.0 } },
                "changes with the length",
            ),
        ] {
            let error = of(&rotary, false).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        }
    }
}
