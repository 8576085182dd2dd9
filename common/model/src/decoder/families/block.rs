//! Turns the description of a family into operators: one builder for all of them.
//!
//! Every tensor has the name of the node that writes it. Not here: which family has what (`known`).

use super::DescribeOptions;
use crate::decoder::{
    Attend, Decoder, DecoderNode, Embed, Gating, LENGTHS, LOGITS, Linear, Norm, NormKind, Op, Route, Select,
    TOKENS,
};

/// A family with every question answered.
pub(super) struct Family {
    pub(super) model_type: String,
    pub(super) hidden: usize,
    pub(super) vocabulary: usize,
    pub(super) positions: usize,
    pub(super) embed: Embed,
    /// Path of the embedding.
    pub(super) embed_path: String,
    pub(super) norms: Norms,
    pub(super) blocks: Vec<Block>,
    /// Path of the norm before the head.
    pub(super) last_norm: Option<String>,
    /// Weight of the head: its own, or the embedding's.
    pub(super) head_weight: String,
    /// `cap * tanh(logits / cap)`.
    pub(super) head_softcap: Option<f32>,
}

/// Every norm of one model, but for its path and width.
#[derive(Clone, Copy)]
pub(super) struct Norms {
    pub(super) kind: NormKind,
    pub(super) epsilon: f32,
}

/// One decoder layer: `x + attention(x)`, then `x + mlp(x)`.
pub(super) struct Block {
    /// Path of the layer.
    pub(super) path: String,
    pub(super) around_attention: Around,
    pub(super) attention: Attention,
    pub(super) around_mlp: Around,
    pub(super) mlp: Mlp,
}

/// Norms around one branch: `after(x + inside(branch(before(x))))`, by their paths in the layer.
#[derive(Clone, Copy, Default)]
pub(super) struct Around {
    pub(super) before: Option<&'static str>,
    pub(super) inside: Option<&'static str>,
    pub(super) after: Option<&'static str>,
}

/// How a model's products store their matrices.
#[derive(Clone, Copy)]
pub(super) struct Stored {
    pub(super) transposed: bool,
    pub(super) bias: bool,
}

pub(super) struct Attention {
    /// Path in the layer.
    pub(super) path: &'static str,
    /// Products for queries, keys and values: three, or one for all.
    pub(super) inputs: &'static [&'static str],
    pub(super) inputs_stored: Stored,
    /// Norms of each head's query and key.
    pub(super) head_norms: Option<[&'static str; 2]>,
    pub(super) output: &'static str,
    pub(super) output_stored: Stored,
    pub(super) attend: Attend,
}

pub(super) struct Mlp {
    /// Path in the layer; empty where its products are the layer's own.
    pub(super) path: &'static str,
    pub(super) names: MlpNames,
    pub(super) stored: Stored,
    pub(super) width: usize,
    pub(super) gating: Gating,
    pub(super) experts: Option<Experts>,
}

/// What stands before the function, and the product behind it.
#[derive(Clone, Copy)]
pub(super) enum MlpNames {
    /// `down(f(gate(x)) * up(x))`.
    Gated { gate: &'static str, up: &'static str, down: &'static str },
    /// The same with gate and up as one product.
    Fused { gate_up: &'static str, down: &'static str },
    /// `down(f(up(x)))`.
    Plain { up: &'static str, down: &'static str },
}

/// Several of the same, of which a router chooses.
pub(super) struct Experts {
    pub(super) router: &'static str,
    pub(super) path: &'static str,
    pub(super) route: Route,
}

pub(super) fn build(family: &Family, options: DescribeOptions) -> Decoder {
    let mut builder = Builder { family, all_tokens: options.calibrate_all_experts, nodes: Vec::new() };
    builder.model();
    Decoder {
        family: family.model_type.clone(),
        hidden: family.hidden,
        vocabulary: family.vocabulary,
        positions: family.positions,
        nodes: builder.nodes,
    }
}

struct Builder<'a> {
    family: &'a Family,
    all_tokens: bool,
    nodes: Vec<DecoderNode>,
}

impl Builder<'_> {
    fn model(&mut self) {
        let family = self.family;
        self.nodes.push(DecoderNode {
            name: family.embed_path.clone(),
            op: Op::Embed(family.embed.clone()),
            inputs: vec![TOKENS.to_owned()],
            outputs: vec![family.embed_path.clone(), LENGTHS.to_owned()],
        });
        let mut stream = family.embed_path.clone();
        for block in &family.blocks {
            stream = self.block(block, stream);
        }
        if let Some(path) = &family.last_norm {
            stream = self.norm(path.clone(), family.hidden, stream);
        }
        self.head(stream);
    }

    fn head(&mut self, stream: String) {
        let head = Linear {
            weight: self.family.head_weight.clone(),
            bias: None,
            rows: self.family.vocabulary,
            cols: self.family.hidden,
            transposed: false,
            kept: Some("output head, kept by default".to_owned()),
        };
        self.push("lm_head".to_owned(), Op::Linear(head), vec![stream]);
        if let Some(cap) = self.family.head_softcap {
            self.push("lm_head.softcap".to_owned(), Op::Softcap { cap }, vec!["lm_head".to_owned()]);
        }
        if let Some(last) = self.nodes.last_mut() {
            last.outputs = vec![LOGITS.to_owned()];
        }
    }

    fn block(&mut self, block: &Block, stream: String) -> String {
        let attention = |builder: &mut Self, x| builder.attention(block, x);
        let stream = self.residual(block, block.around_attention, "attention_residual", stream, attention);
        let mlp = |builder: &mut Self, x| builder.mlp(block, x);
        self.residual(block, block.around_mlp, "mlp_residual", stream, mlp)
    }

    /// `after(x + inside(branch(before(x))))`.
    fn residual(
        &mut self,
        block: &Block,
        around: Around,
        sum: &str,
        stream: String,
        branch: impl FnOnce(&mut Self, String) -> String,
    ) -> String {
        let input = self.layer_norm(block, around.before, stream.clone());
        let output = branch(self, input);
        let output = self.layer_norm(block, around.inside, output);
        let total = self.push(join(&block.path, sum), Op::Add, vec![stream, output]);
        self.layer_norm(block, around.after, total)
    }

    fn layer_norm(&mut self, block: &Block, path: Option<&str>, input: String) -> String {
        match path {
            Some(path) => self.norm(join(&block.path, path), self.family.hidden, input),
            None => input,
        }
    }

    fn attention(&mut self, block: &Block, input: String) -> String {
        let Attention { attend, .. } = &block.attention;
        let path = join(&block.path, block.attention.path);
        let (queries, keys) = (attend.heads * attend.head_dim, attend.kv_heads * attend.head_dim);
        let rows: &[usize] = match block.attention.inputs.len() {
            1 => &[queries + 2 * keys],
            _ => &[queries, keys, keys],
        };
        let products = block.attention.inputs.iter().zip(rows);
        let mut inputs: Vec<String> = products
            .map(|(name, rows)| {
                let shape = [*rows, self.family.hidden];
                self.linear(join(&path, name), shape, block.attention.inputs_stored, input.clone())
            })
            .collect();
        for (i, name) in block.attention.head_norms.into_iter().flatten().enumerate() {
            inputs[i] = self.norm(join(&path, name), attend.head_dim, inputs[i].clone());
        }
        inputs.push(LENGTHS.to_owned());
        let heads = self.push(join(&path, "attend"), Op::Attend(attend.clone()), inputs);
        let shape = [self.family.hidden, queries];
        self.linear(join(&path, block.attention.output), shape, block.attention.output_stored, heads)
    }

    fn mlp(&mut self, block: &Block, input: String) -> String {
        let path = join(&block.path, block.mlp.path);
        match &block.mlp.experts {
            None => self.one_mlp(&block.mlp, &path, input),
            Some(experts) => self.experts(&block.mlp, experts, &path, input),
        }
    }

    fn one_mlp(&mut self, mlp: &Mlp, path: &str, input: String) -> String {
        let (hidden, width) = (self.family.hidden, mlp.width);
        let mut up = |name: &str, rows: usize| {
            self.linear(join(path, name), [rows, hidden], mlp.stored, input.clone())
        };
        let (down, op, inputs) = match mlp.names {
            MlpNames::Gated { gate, up: other, down } => {
                (down, Op::Gate(mlp.gating), vec![up(gate, width), up(other, width)])
            }
            MlpNames::Fused { gate_up, down } => (down, Op::Gate(mlp.gating), vec![up(gate_up, 2 * width)]),
            MlpNames::Plain { up: only, down } => (down, Op::Activate(mlp.gating), vec![up(only, width)]),
        };
        let inner = self.push(join(path, "act"), op, inputs);
        self.linear(join(path, down), [hidden, width], mlp.stored, inner)
    }

    fn experts(&mut self, mlp: &Mlp, experts: &Experts, path: &str, input: String) -> String {
        let (all_tokens, count) = (self.all_tokens, experts.route.experts);
        let router = join(path, experts.router);
        let linear = Linear {
            weight: format!("{router}.weight"),
            bias: None,
            rows: count,
            cols: self.family.hidden,
            transposed: false,
            kept: Some("router".to_owned()),
        };
        let scores = self.push(router, Op::Linear(linear), vec![input.clone()]);
        let weights = self.push(join(path, "route"), Op::Route(experts.route.clone()), vec![scores]);
        let mut outputs = vec![weights.clone()];
        for expert in 0..count {
            let own = join(path, &format!("{}.{expert}", experts.path));
            let select = Op::Select(Select { expert, all_tokens });
            let tokens = self.push(join(&own, "select"), select, vec![input.clone(), weights.clone()]);
            outputs.push(self.one_mlp(mlp, &own, tokens));
        }
        self.push(join(path, "combine"), Op::Combine { all_tokens }, outputs)
    }

    fn norm(&mut self, path: String, width: usize, input: String) -> String {
        let Norms { kind, epsilon } = self.family.norms;
        let bias = (kind == NormKind::Layer).then(|| format!("{path}.bias"));
        let norm = Norm { kind, weight: format!("{path}.weight"), bias, epsilon, width };
        self.push(path, Op::Norm(norm), vec![input])
    }

    fn linear(&mut self, path: String, [rows, cols]: [usize; 2], stored: Stored, input: String) -> String {
        let linear = Linear {
            weight: format!("{path}.weight"),
            bias: stored.bias.then(|| format!("{path}.bias")),
            rows,
            cols,
            transposed: stored.transposed,
            kept: None,
        };
        self.push(path, Op::Linear(linear), vec![input])
    }

    /// Adds a node whose only output has its name.
    fn push(&mut self, name: String, op: Op, inputs: Vec<String>) -> String {
        self.nodes.push(DecoderNode { name: name.clone(), op, inputs, outputs: vec![name.clone()] });
        name
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() || name.is_empty() { format!("{path}{name}") } else { format!("{path}.{name}") }
}
