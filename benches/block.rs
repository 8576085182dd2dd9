//! A block of a Llama as a decoder: attention and a gated network.
//!
//! Not here: weights, measuring (`benches/decoder.rs`, `gpu/decoder.rs`).

use halfstep_model::decoder::{
    Attend, Decoder, DecoderNode, Embed, Gating, LENGTHS, Linear, Norm, NormKind, Op, Rotary, Rotation,
    TOKENS,
};

/// Sizes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Whose.
    pub(crate) name: &'static str,
    /// Width of the residual stream.
    pub(crate) hidden: usize,
    /// Width inside the gated network.
    pub(crate) inner: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads.
    pub(crate) kv_heads: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
}

fn node(name: &str, op: Op, inputs: &[&str], output: &str) -> DecoderNode {
    let inputs = inputs.iter().map(|name| (*name).to_owned()).collect();
    DecoderNode { name: name.to_owned(), op, inputs, outputs: vec![output.to_owned()] }
}

/// The block, behind an embedding that gives its input the name `x`; it writes `y`. The inputs of its linear layers: `norm`,
/// `mixed`, `norm1`, `h`.
pub(crate) fn block(sizes: Sizes, positions: usize) -> Decoder {
    let Sizes { hidden, inner, heads, kv_heads, head_dim, .. } = sizes;
    let linear = |name: &str, cols, rows, input: &str| {
        let op = Linear {
            weight: format!("{name}.weight"),
            bias: None,
            rows,
            cols,
            transposed: false,
            kept: None,
        };
        node(name, Op::Linear(op), &[input], name)
    };
    let norm = |name: &str, input: &str| {
        let weight = format!("{name}.weight");
        let op = Norm { kind: NormKind::Rms, weight, bias: None, epsilon: 1e-5, width: hidden };
        node(name, Op::Norm(op), &[input], name)
    };
    let frequencies =
        (0..head_dim / 2).map(|pair| 1e4f32.powf(-2.0 * pair as f32 / head_dim as f32)).collect();
    let attend = Attend {
        heads,
        kv_heads,
        head_dim,
        scale: (head_dim as f32).sqrt().recip(),
        softcap: None,
        window: None,
        rotary: Some(Rotary { width: head_dim, rotation: Rotation::Fixed { frequencies, factor: 1.0 } }),
    };
    let embed = Embed { weight: "embed".into(), scale: 1.0, positions: None };
    let embed = DecoderNode {
        name: "embed".into(),
        op: Op::Embed(embed),
        inputs: vec![TOKENS.into()],
        outputs: vec!["x".into(), LENGTHS.into()],
    };
    let nodes = vec![
        embed,
        norm("norm", "x"),
        linear("q", hidden, heads * head_dim, "norm"),
        linear("k", hidden, kv_heads * head_dim, "norm"),
        linear("v", hidden, kv_heads * head_dim, "norm"),
        node("attend", Op::Attend(attend), &["q", "k", "v", LENGTHS], "mixed"),
        linear("o", heads * head_dim, hidden, "mixed"),
        node("add", Op::Add, &["x", "o"], "x1"),
        norm("norm1", "x1"),
        linear("gate", hidden, inner, "norm1"),
        linear("up", hidden, inner, "norm1"),
        node("gated", Op::Gate(Gating::Silu), &["gate", "up"], "h"),
        linear("down", inner, hidden, "h"),
        node("add1", Op::Add, &["x1", "down"], "y"),
    ];
    Decoder { family: sizes.name.into(), hidden, vocabulary: 2, positions, nodes }
}
