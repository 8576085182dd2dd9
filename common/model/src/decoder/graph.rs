//! The operators of a decoder and how they are strung together.
//!
//! Sequences are never padded inside: the tokens of a batch stand one after the other, `[P, width]` with `P` the sum of
//! the lengths, and `lengths` `[n]` says where each ends. Every operator but [`Attend`] works on single rows.
//! Not here: which families exist and what their configurations mean (`families`), what makes a graph valid (`check`).

use serde::{Deserialize, Serialize};

/// The token ids a decoder reads: `[n, T]` i64, -1 behind the end of a shorter sequence.
pub const TOKENS: &str = "input_ids";
/// Tokens of each sequence, `[n]` i64; written by [`Op::Embed`].
pub const LENGTHS: &str = "lengths";
/// What the last operator writes: `[P, vocabulary]` f32.
pub const LOGITS: &str = "logits";

/// A decoder-only language model without its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decoder {
    /// `model_type` of its configuration.
    pub family: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Longest sequence its positions are made for.
    pub positions: usize,
    /// In the order they run; each reads what the ones before it wrote, or [`TOKENS`].
    pub nodes: Vec<Node>,
}

impl Decoder {
    /// Longest sequence it should be given: that of its positions, unless its rotation grows with the sequence.
    pub fn longest(&self) -> Option<usize> {
        let grows = |node: &Node| match &node.op {
            Op::Attend(attend) => {
                let rotary = attend.rotary.as_ref();
                rotary.is_some_and(|rotary| matches!(rotary.rotation, Rotation::Dynamic { .. }))
            }
            _ => false,
        };
        (!self.nodes.iter().any(grows)).then_some(self.positions)
    }
}

/// One operator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Unique; the module's path in the checkpoint where it has one (`model.layers.0.self_attn.q_proj`).
    pub name: String,
    /// What it does.
    pub op: Op,
    /// Tensors it reads, in the order its operator states.
    pub inputs: Vec<String>,
    /// Tensors it writes.
    pub outputs: Vec<String>,
}

/// What a node computes. `[P, ..]` are f32.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// [`TOKENS`] -> `[P, hidden]`, [`LENGTHS`].
    Embed(Embed),
    /// `[P, k * width]` -> the same shape; each run of `width` is normalised by itself. A learned position needs nothing
    /// here: it is part of the embedding.
    Norm(Norm),
    /// `[P, cols]` -> `[P, rows]`.
    Linear(Linear),
    /// Queries, keys and values, as three tensors or one after the other in the rows of one; then [`LENGTHS`]
    /// -> `[P, heads * head_dim]`.
    Attend(Attend),
    /// Gate and up, as two tensors `[P, w]` or halves of one `[P, 2 w]` -> `[P, w]`: `f(gate) * up`.
    Gate(Gating),
    /// `[P, w]` -> `[P, w]`: `f(x)`.
    Activate(Gating),
    /// Two of `[P, w]` -> their sum.
    Add,
    /// `[P, w]` -> `[P, w]`: `cap * tanh(x / cap)`.
    Softcap {
        /// The bound.
        cap: f32,
    },
    /// Router's output `[P, experts]` -> weights of the experts, `[P, experts]`, 0 for those not chosen. Decided by the
    /// original model for both streams: statistics of an expert are over the same tokens on both.
    Route(Route),
    /// `[P, w]` and weights `[P, experts]` -> the rows of one expert's tokens, `[p, w]`; `p` may be 0.
    Select(Select),
    /// Weights `[P, experts]`, then every expert's output `[p, w]` -> `[P, w]`: the weighted sum, experts in order.
    Combine {
        /// As in the [`Select`] before.
        all_tokens: bool,
    },
}

/// Token embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embed {
    /// `[vocabulary, hidden]`.
    pub weight: String,
    /// Factor of the embedding, in the checkpoint's element type where the family says so.
    pub scale: f32,
    /// Learned positions that are added.
    pub positions: Option<Positions>,
}

/// Learned positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Positions {
    /// `[offset + positions, hidden]`.
    pub weight: String,
    /// Row of the first position.
    pub offset: usize,
}

/// Which mean and deviation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + epsilon) * weight`.
    Rms,
    /// The same, times `1 + weight`.
    RmsUnitOffset,
    /// `(x - mean) / sqrt(variance + epsilon) * weight + bias`.
    Layer,
}

/// Normalisation of runs of `width`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// Which.
    pub kind: NormKind,
    /// `[width]`.
    pub weight: String,
    /// `[width]`.
    pub bias: Option<String>,
    /// Added to the mean square.
    pub epsilon: f32,
    /// Numbers normalised together.
    pub width: usize,
}

/// A product with a constant matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// `[rows, cols]`, or `[cols, rows]` if `transposed`.
    pub weight: String,
    /// `[rows]`.
    pub bias: Option<String>,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// How the checkpoint stores it (GPT-2).
    pub transposed: bool,
    /// Why it is never quantized; `None` for those that may be.
    pub kept: Option<String>,
}

/// Causal attention with grouped queries. Query head `h` reads key head `h / (heads / kv_heads)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attend {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` before the softmax.
    pub softcap: Option<f32>,
    /// Position `t` sees `t - window + 1 ..= t`; all before it where absent.
    pub window: Option<usize>,
    /// Rotation of queries and keys.
    pub rotary: Option<Rotary>,
}

/// Rotary positions: entry `i` and `i + width / 2` of each head turn together by `position * frequency[i]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotary {
    /// Leading entries of a head that turn; even, at most `head_dim`.
    pub width: usize,
    /// How fast.
    pub rotation: Rotation,
}

/// Frequencies, `width / 2` of them, and the factor of sine and cosine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rotation {
    /// The same for every length.
    Fixed {
        /// Radians per position.
        frequencies: Vec<f32>,
        /// Factor of sine and cosine.
        factor: f32,
    },
    /// Other frequencies for sequences longer than `after`.
    ByLength {
        /// Positions.
        after: usize,
        /// Up to there.
        short: Vec<f32>,
        /// Beyond.
        long: Vec<f32>,
        /// Factor of sine and cosine.
        factor: f32,
    },
    /// Base grown with the sequence's length `L` beyond `after`:
    /// `base * (scaling * L / after - (scaling - 1))^(width / (width - 2))`.
    Dynamic {
        /// Positions.
        after: usize,
        /// Base up to there.
        base: f32,
        /// Growth.
        scaling: f32,
    },
}

/// The function of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Gating {
    /// `x * sigmoid(x)`.
    Silu,
    /// Exact, by the error function.
    Gelu,
    /// By tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// Choice of experts: softmax over all, then the largest `top_k` (the lower index where equal).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Experts.
    pub experts: usize,
    /// Chosen per token.
    pub top_k: usize,
    /// Whether the chosen weights are divided by their sum.
    pub normalise: bool,
}

/// One expert's tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Select {
    /// Which.
    pub expert: usize,
    /// Every token, whatever the routing: for statistics of experts that few tokens reach.
    pub all_tokens: bool,
}

impl Op {
    /// Constants it reads, with their shapes in the checkpoint.
    pub fn constants(&self, decoder: &Decoder) -> Vec<(&str, Vec<usize>)> {
        match self {
            Self::Embed(embed) => {
                let mut all = vec![(embed.weight.as_str(), vec![decoder.vocabulary, decoder.hidden])];
                all.extend(embed.positions.iter().map(|p| {
                    (p.weight.as_str(), vec![p.offset.saturating_add(decoder.positions), decoder.hidden])
                }));
                all
            }
            Self::Norm(norm) => {
                let names = [Some(&norm.weight), norm.bias.as_ref()];
                names.into_iter().flatten().map(|name| (name.as_str(), vec![norm.width])).collect()
            }
            Self::Linear(linear) => {
                let bias = linear.bias.iter().map(|bias| (bias.as_str(), vec![linear.rows]));
                [(linear.weight.as_str(), linear.weight_shape())].into_iter().chain(bias).collect()
            }
            _ => Vec::new(),
        }
    }
}

impl Op {
    /// Names of the constants it reads, to be changed.
    pub(super) fn constant_names(&mut self) -> Vec<&mut String> {
        match self {
            Self::Embed(embed) => {
                let positions = embed.positions.as_mut().map(|positions| &mut positions.weight);
                [Some(&mut embed.weight), positions].into_iter().flatten().collect()
            }
            Self::Norm(norm) => [Some(&mut norm.weight), norm.bias.as_mut()].into_iter().flatten().collect(),
            Self::Linear(linear) => {
                [Some(&mut linear.weight), linear.bias.as_mut()].into_iter().flatten().collect()
            }
            _ => Vec::new(),
        }
    }
}

impl Linear {
    /// Of the tensor in the checkpoint.
    pub fn weight_shape(&self) -> Vec<usize> {
        if self.transposed { vec![self.cols, self.rows] } else { vec![self.rows, self.cols] }
    }
}
