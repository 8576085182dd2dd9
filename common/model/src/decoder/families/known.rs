//! The families: what each has, read from its configuration.
//!
//! Sources: the published configurations and the `transformers` classes of the same names.

use super::FamilyError;
use super::block::{Around, Attention, Block, Experts, Family, Mlp, MlpNames, Norms, Stored};
use super::fields::Fields;
use super::rotary::{Defaults, plain, rotary};
use crate::decoder::{Attend, Embed, Gating, NormKind, Positions, Rotary, Route};
use std::ops::RangeInclusive;

const KNOWN: &str = "llama, mistral, qwen2, qwen3, phi3, gemma2, gemma3_text, gpt2, opt, mixtral, qwen3_moe";

// Beyond these a configuration is a mistake; products of two of them stay within the address space.
const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
const HEADS: RangeInclusive<usize> = 1..=1 << 14;
const HEAD_DIM: RangeInclusive<usize> = 1..=1 << 14;
const LAYERS: RangeInclusive<usize> = 1..=1 << 10;
const EXPERTS: RangeInclusive<usize> = 1..=1 << 10;
const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;
const POSITIONS: RangeInclusive<usize> = 1..=1 << 30;
/// Layers times experts: each expert is several operators.
const ALL_EXPERTS_MAX: usize = 1 << 15;

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

pub(super) fn family(fields: &Fields<'_>) -> Result<Family, FamilyError> {
    let model_type =
        fields.text("model_type")?.ok_or_else(|| fields.refuse("model_type", format!("one of {KNOWN}")))?;
    match model_type {
        "llama" => gated(fields, &LLAMA),
        "mistral" => gated(fields, &MISTRAL),
        "qwen2" => gated(fields, &QWEN2),
        "qwen3" => gated(fields, &QWEN3),
        "phi3" => gated(fields, &PHI3),
        "gemma2" => gated(fields, &GEMMA2),
        "gemma3_text" => gated(fields, &GEMMA3),
        "mixtral" => gated(fields, &MIXTRAL),
        "qwen3_moe" => gated(fields, &QWEN3_MOE),
        "gpt2" => gpt2(fields),
        "opt" => opt(fields),
        other => Err(FamilyError::Family { model_type: other.to_owned(), known: KNOWN.to_owned() }),
    }
}

/// What tells the families of rotary positions and gated MLPs from each other.
struct Traits {
    name: &'static str,
    /// Biases of queries, keys and values, and of the output.
    attention_bias: Biases,
    mlp_bias: bool,
    fused: bool,
    head_norms: bool,
    /// `head_dim` where it is absent; else the width divided by the heads.
    head_dim: Option<usize>,
    theta: f64,
    epsilon: f64,
    windows: Windows,
    tied: bool,
    /// Norms of `1 + weight` on both sides of a branch, a scaled embedding, softcaps.
    gemma: Option<Gemma>,
    experts: Option<Moe>,
}

enum Biases {
    None,
    /// `attention_bias`, on all four.
    Configured,
    /// On queries, keys and values.
    Inputs,
}

/// Which layers have a window, and its width where `sliding_window` is absent.
enum Windows {
    Never,
    Every {
        default: Option<usize>,
    },
    /// With `use_sliding_window`: from `max_window_layers` on.
    LateLayers,
    /// With `use_sliding_window`: all.
    EveryIfUsed,
    /// All but every n-th: `sliding_window_pattern`.
    Alternating {
        pattern: usize,
    },
}

struct Gemma {
    attention_softcap: Option<f32>,
    head_softcap: Option<f32>,
    /// Base of layers with a window, where theirs is another.
    local_theta: Option<f64>,
}

/// Names of a mixture of experts.
struct Moe {
    path: &'static str,
    names: MlpNames,
    width: &'static str,
    always_normalised: bool,
}

const SPLIT: MlpNames = MlpNames::Gated { gate: "gate_proj", up: "up_proj", down: "down_proj" };

const LLAMA: Traits = Traits {
    name: "llama",
    attention_bias: Biases::Configured,
    mlp_bias: true,
    fused: false,
    head_norms: false,
    head_dim: None,
    theta: 1e4,
    epsilon: 1e-6,
    windows: Windows::Never,
    tied: false,
    gemma: None,
    experts: None,
};

const MISTRAL: Traits = Traits {
    name: "mistral",
    attention_bias: Biases::None,
    mlp_bias: false,
    windows: Windows::Every { default: Some(4096) },
    ..LLAMA
};

const QWEN2: Traits = Traits {
    name: "qwen2",
    attention_bias: Biases::Inputs,
    mlp_bias: false,
    windows: Windows::LateLayers,
    ..LLAMA
};

const QWEN3: Traits = Traits {
    name: "qwen3",
    mlp_bias: false,
    head_norms: true,
    head_dim: Some(128),
    windows: Windows::LateLayers,
    ..LLAMA
};

const PHI3: Traits = Traits {
    name: "phi3",
    attention_bias: Biases::None,
    mlp_bias: false,
    fused: true,
    epsilon: 1e-5,
    windows: Windows::Every { default: None },
    ..LLAMA
};

const GEMMA2: Traits = Traits {
    name: "gemma2",
    mlp_bias: false,
    head_dim: Some(256),
    windows: Windows::Alternating { pattern: 2 },
    tied: true,
    gemma: Some(Gemma { attention_softcap: Some(50.0), head_softcap: Some(30.0), local_theta: None }),
    ..LLAMA
};

const GEMMA3: Traits = Traits {
    name: "gemma3_text",
    head_norms: true,
    theta: 1e6,
    windows: Windows::Alternating { pattern: 6 },
    gemma: Some(Gemma { attention_softcap: None, head_softcap: None, local_theta: Some(1e4) }),
    ..GEMMA2
};

const MIXTRAL: Traits = Traits {
    name: "mixtral",
    theta: 1e6,
    epsilon: 1e-5,
    windows: Windows::Every { default: None },
    experts: Some(Moe {
        path: "block_sparse_moe",
        names: MlpNames::Gated { gate: "w1", up: "w3", down: "w2" },
        width: "intermediate_size",
        always_normalised: true,
    }),
    ..MISTRAL
};

const QWEN3_MOE: Traits = Traits {
    name: "qwen3_moe",
    head_dim: None,
    windows: Windows::EveryIfUsed,
    experts: Some(Moe {
        path: "mlp",
        names: SPLIT,
        width: "moe_intermediate_size",
        always_normalised: false,
    }),
    ..QWEN3
};

/// The sizes that every family has, whatever it calls them.
struct Sizes {
    hidden: usize,
    heads: usize,
    layers: usize,
    vocabulary: usize,
    positions: usize,
}

impl Sizes {
    /// `names`: of width, heads, layers and positions.
    fn read(fields: &Fields<'_>, names: [&str; 4]) -> Result<Self, FamilyError> {
        Ok(Self {
            hidden: fields.size(names[0], WIDTH)?,
            heads: fields.size(names[1], HEADS)?,
            layers: fields.size(names[2], LAYERS)?,
            vocabulary: fields.size("vocab_size", VOCABULARY)?,
            positions: fields.size(names[3], POSITIONS)?,
        })
    }

    /// Width of a head where the heads share the stream's width.
    fn head_dim(&self, fields: &Fields<'_>, heads: &str) -> Result<usize, FamilyError> {
        match self.hidden.is_multiple_of(self.heads) {
            true => Ok(self.hidden / self.heads),
            false => Err(fields.refuse(heads, format!("a divisor of the width, {}", self.hidden))),
        }
    }
}

const USUAL: [&str; 4] =
    ["hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"];

fn gated(fields: &Fields<'_>, traits: &Traits) -> Result<Family, FamilyError> {
    let sizes = Sizes::read(fields, USUAL)?;
    fields.must_not_be_set("use_bidirectional_attention")?;
    let layer_types = layer_types(fields, traits, sizes.layers)?;
    let blocks: Result<Vec<Block>, FamilyError> = layer_types
        .iter()
        .enumerate()
        .map(|(i, kind)| gated_block(fields, traits, &sizes, i, kind))
        .collect();
    let embed_path = "model.embed_tokens".to_owned();
    let kind = if traits.gemma.is_some() { NormKind::RmsUnitOffset } else { NormKind::Rms };
    Ok(Family {
        model_type: traits.name.to_owned(),
        hidden: sizes.hidden,
        vocabulary: sizes.vocabulary,
        positions: sizes.positions,
        embed: Embed {
            weight: format!("{embed_path}.weight"),
            scale: embed_scale(fields, traits, &sizes)?,
            positions: None,
        },
        norms: Norms { kind, epsilon: fields.positive("rms_norm_eps")?.unwrap_or(traits.epsilon) as f32 },
        blocks: blocks?,
        last_norm: Some("model.norm".to_owned()),
        head_weight: head_weight(fields, traits.tied, &embed_path)?,
        head_softcap: match &traits.gemma {
            Some(gemma) => softcap(fields, "final_logit_softcapping", gemma.head_softcap)?,
            None => None,
        },
        embed_path,
    })
}

fn head_weight(fields: &Fields<'_>, tied: bool, embed_path: &str) -> Result<String, FamilyError> {
    let tied = fields.flag("tie_word_embeddings", tied)?;
    Ok(if tied { format!("{embed_path}.weight") } else { "lm_head.weight".to_owned() })
}

/// Absent: the family's; `null`: none.
fn softcap(fields: &Fields<'_>, name: &str, default: Option<f32>) -> Result<Option<f32>, FamilyError> {
    match fields.is_null(name) {
        true => Ok(None),
        false => Ok(fields.positive(name)?.map(|cap| cap as f32).or(default)),
    }
}

/// Gemma multiplies the embedding by the root of its width, rounded to the element type of the checkpoint.
fn embed_scale(fields: &Fields<'_>, traits: &Traits, sizes: &Sizes) -> Result<f32, FamilyError> {
    if traits.gemma.is_none() {
        return Ok(1.0);
    }
    let scale = (sizes.hidden as f64).sqrt() as f32;
    let name = if fields.has("dtype") { "dtype" } else { "torch_dtype" };
    match fields.text(name)?.map(|dtype| dtype.trim_start_matches("torch.")) {
        None | Some("float32") => Ok(scale),
        Some("bfloat16") => Ok(rounded(scale, 8)),
        Some("float16") => Ok(rounded(scale, 11)),
        Some(_) => Err(fields.refuse(name, "float32, bfloat16 or float16")),
    }
}

/// To so many significant bits, the even one of two equally near. `x` is at least 1.
fn rounded(x: f32, bits: i32) -> f32 {
    let step = f64::from(x).log2().floor().exp2() / f64::from(bits - 1).exp2();
    ((f64::from(x) / step).round_ties_even() * step) as f32
}

/// Of each layer, whether it sees a window.
fn layer_types(
    fields: &Fields<'_>,
    traits: &Traits,
    layers: usize,
) -> Result<Vec<&'static str>, FamilyError> {
    let name = |sliding: bool| if sliding { SLIDING } else { FULL };
    let by_layer = matches!(traits.windows, Windows::LateLayers | Windows::Alternating { .. });
    if by_layer && let Some(stated) = fields.texts("layer_types", layers)? {
        let known = stated.iter().all(|kind| [SLIDING, FULL].contains(kind));
        let types = stated.iter().map(|kind| name(*kind == SLIDING)).collect();
        return if known {
            Ok(types)
        } else {
            Err(fields.refuse("layer_types", format!("{SLIDING} or {FULL}")))
        };
    }
    let from = match traits.windows {
        Windows::LateLayers => fields.optional_size("max_window_layers", 0..=usize::MAX)?.unwrap_or(28),
        _ => 0,
    };
    let pattern = match traits.windows {
        Windows::Alternating { pattern } => {
            let stated = ["sliding_window_pattern", "_sliding_window_pattern"];
            let stated = stated.into_iter().find(|name| fields.has(name) && traits.head_norms);
            stated.map_or(Ok(pattern), |name| fields.size(name, 1..=1 << 10))?
        }
        _ => usize::MAX,
    };
    let sliding = |i: usize| match traits.windows {
        Windows::Never => false,
        Windows::Every { .. } | Windows::EveryIfUsed => true,
        Windows::LateLayers => i >= from,
        Windows::Alternating { .. } => !(i + 1).is_multiple_of(pattern),
    };
    Ok((0..layers).map(|i| name(sliding(i))).collect())
}

fn window(fields: &Fields<'_>, traits: &Traits, layer_type: &str) -> Result<Option<usize>, FamilyError> {
    let used = match traits.windows {
        Windows::Never => false,
        Windows::LateLayers | Windows::EveryIfUsed => fields.flag("use_sliding_window", false)?,
        Windows::Every { .. } | Windows::Alternating { .. } => true,
    };
    if !used || layer_type != SLIDING || fields.is_null("sliding_window") {
        return Ok(None);
    }
    let default = match traits.windows {
        Windows::Every { default } => default,
        _ => Some(4096),
    };
    Ok(fields.optional_size("sliding_window", POSITIONS)?.or(default))
}

fn gated_block(
    fields: &Fields<'_>,
    traits: &Traits,
    sizes: &Sizes,
    index: usize,
    layer_type: &str,
) -> Result<Block, FamilyError> {
    const BEFORE: Around = Around { before: Some("input_layernorm"), inside: None, after: None };
    let (around_attention, around_mlp) = match traits.gemma {
        None => (BEFORE, Around { before: Some("post_attention_layernorm"), ..BEFORE }),
        Some(_) => (
            Around { inside: Some("post_attention_layernorm"), ..BEFORE },
            Around {
                before: Some("pre_feedforward_layernorm"),
                inside: Some("post_feedforward_layernorm"),
                after: None,
            },
        ),
    };
    Ok(Block {
        path: format!("model.layers.{index}"),
        around_attention,
        attention: gated_attention(fields, traits, sizes, layer_type)?,
        around_mlp,
        mlp: gated_mlp(fields, traits, sizes, index)?,
    })
}

fn gated_attention(
    fields: &Fields<'_>,
    traits: &Traits,
    sizes: &Sizes,
    layer_type: &str,
) -> Result<Attention, FamilyError> {
    let (inputs_bias, output_bias) = match traits.attention_bias {
        Biases::None => (false, false),
        Biases::Inputs => (true, false),
        Biases::Configured => {
            let bias = fields.flag("attention_bias", false)?;
            (bias, bias)
        }
    };
    let stored = |bias| Stored { transposed: false, bias };
    Ok(Attention {
        path: "self_attn",
        inputs: if traits.fused { &["qkv_proj"] } else { &["q_proj", "k_proj", "v_proj"] },
        inputs_stored: stored(inputs_bias),
        head_norms: traits.head_norms.then_some(["q_norm", "k_norm"]),
        output: "o_proj",
        output_stored: stored(output_bias),
        attend: gated_attend(fields, traits, sizes, layer_type)?,
    })
}

fn gated_attend(
    fields: &Fields<'_>,
    traits: &Traits,
    sizes: &Sizes,
    layer_type: &str,
) -> Result<Attend, FamilyError> {
    let head_dim = match fields.optional_size("head_dim", HEAD_DIM)?.or(traits.head_dim) {
        Some(head_dim) => head_dim,
        None => sizes.head_dim(fields, USUAL[1])?,
    };
    let kv_heads = fields.optional_size("num_key_value_heads", HEADS)?.unwrap_or(sizes.heads);
    if !sizes.heads.is_multiple_of(kv_heads) {
        return Err(fields.refuse("num_key_value_heads", format!("a divisor of {} heads", sizes.heads)));
    }
    if sizes.heads * head_dim > *WIDTH.end() {
        return Err(fields
            .refuse("head_dim", format!("at most {} for {} heads", WIDTH.end() / sizes.heads, sizes.heads)));
    }
    let scalar = match traits.gemma {
        Some(_) => fields.positive("query_pre_attn_scalar")?.unwrap_or(256.0),
        None => head_dim as f64,
    };
    Ok(Attend {
        heads: sizes.heads,
        kv_heads,
        head_dim,
        scale: scalar.sqrt().recip() as f32,
        softcap: match &traits.gemma {
            // Gemma 3 has the field, but its attention does not read it.
            Some(gemma) if gemma.attention_softcap.is_some() => {
                softcap(fields, "attn_logit_softcapping", gemma.attention_softcap)?
            }
            _ => None,
        },
        window: window(fields, traits, layer_type)?,
        rotary: Some(gated_rotary(fields, traits, layer_type, head_dim)?),
    })
}

fn gated_rotary(
    fields: &Fields<'_>,
    traits: &Traits,
    layer_type: &str,
    head_dim: usize,
) -> Result<Rotary, FamilyError> {
    let mut defaults = Defaults { theta: traits.theta, partial: traits.fused, always_longrope: traits.fused };
    if let Some(Gemma { local_theta: Some(local), .. }) = traits.gemma
        && layer_type == SLIDING
    {
        let nested = match fields.object("rope_parameters")? {
            Some(parameters) => parameters.object(SLIDING)?.is_some(),
            None => false,
        };
        if !nested {
            let theta = fields.positive("rope_local_base_freq")?.unwrap_or(local);
            return Ok(plain(theta, head_dim));
        }
        defaults.theta = local;
    }
    rotary(fields, layer_type, &defaults, head_dim)
}

fn gated_mlp(fields: &Fields<'_>, traits: &Traits, sizes: &Sizes, index: usize) -> Result<Mlp, FamilyError> {
    let activation = if traits.gemma.is_some() { "hidden_activation" } else { "hidden_act" };
    let default = if traits.gemma.is_some() { "gelu_pytorch_tanh" } else { "silu" };
    let dense = Mlp {
        path: "mlp",
        names: match traits.fused {
            true => MlpNames::Fused { gate_up: "gate_up_proj", down: "down_proj" },
            false => SPLIT,
        },
        stored: Stored { transposed: false, bias: traits.mlp_bias && fields.flag("mlp_bias", false)? },
        width: fields.size("intermediate_size", WIDTH)?,
        gating: gating(fields, activation, default)?,
        experts: None,
    };
    let Some(moe) = &traits.experts else { return Ok(dense) };
    if !moe.always_normalised && !is_sparse(fields, index)? {
        return Ok(dense);
    }
    Ok(Mlp {
        path: moe.path,
        names: moe.names,
        width: fields.size(moe.width, WIDTH)?,
        experts: Some(experts(fields, moe, sizes)?),
        ..dense
    })
}

/// Whether a layer of Qwen3-MoE has experts.
fn is_sparse(fields: &Fields<'_>, index: usize) -> Result<bool, FamilyError> {
    let step = fields.optional_size("decoder_sparse_step", 1..=1 << 20)?.unwrap_or(1);
    Ok((index + 1).is_multiple_of(step) && !fields.sizes("mlp_only_layers")?.contains(&index))
}

fn experts(fields: &Fields<'_>, moe: &Moe, sizes: &Sizes) -> Result<Experts, FamilyError> {
    let name = if fields.has("num_local_experts") { "num_local_experts" } else { "num_experts" };
    let experts = fields.size(name, EXPERTS)?;
    if experts * sizes.layers > ALL_EXPERTS_MAX {
        let most = ALL_EXPERTS_MAX / sizes.layers;
        return Err(fields.refuse(name, format!("at most {most} for {} layers", sizes.layers)));
    }
    let top_k = fields.size("num_experts_per_tok", 1..=experts)?;
    let normalise = moe.always_normalised || fields.flag("norm_topk_prob", false)?;
    Ok(Experts { router: "gate", path: "experts", route: Route { experts, top_k, normalise } })
}

fn gating(fields: &Fields<'_>, name: &str, default: &str) -> Result<Gating, FamilyError> {
    match fields.text(name)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Gating::Silu),
        "gelu" => Ok(Gating::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Gating::GeluTanh),
        "relu" => Ok(Gating::Relu),
        _ => Err(fields.refuse(name, "silu, gelu, gelu_new, gelu_pytorch_tanh or relu")),
    }
}

fn gpt2(fields: &Fields<'_>) -> Result<Family, FamilyError> {
    let sizes = Sizes::read(fields, ["n_embd", "n_head", "n_layer", "n_positions"])?;
    fields.must_not_be_set("add_cross_attention")?;
    let head_dim = sizes.head_dim(fields, "n_head")?;
    let stored = Stored { transposed: true, bias: true };
    let width = fields.optional_size("n_inner", WIDTH)?.unwrap_or(4 * sizes.hidden);
    let gating = gating(fields, "activation_function", "gelu_new")?;
    let base = if fields.flag("scale_attn_weights", true)? { (head_dim as f64).sqrt().recip() } else { 1.0 };
    let by_layer = fields.flag("scale_attn_by_inverse_layer_idx", false)?;
    let block = |index: usize| Block {
        path: format!("transformer.h.{index}"),
        around_attention: Around { before: Some("ln_1"), ..Around::default() },
        attention: Attention {
            path: "attn",
            inputs: &["c_attn"],
            inputs_stored: stored,
            head_norms: None,
            output: "c_proj",
            output_stored: stored,
            attend: whole_heads(&sizes, head_dim, if by_layer { base / (index + 1) as f64 } else { base }),
        },
        around_mlp: Around { before: Some("ln_2"), ..Around::default() },
        mlp: Mlp {
            path: "mlp",
            names: MlpNames::Plain { up: "c_fc", down: "c_proj" },
            stored,
            width,
            gating,
            experts: None,
        },
    };
    let positions = Positions { weight: "transformer.wpe.weight".to_owned(), offset: 0 };
    let embed_path = "transformer.wte".to_owned();
    let epsilon = fields.positive("layer_norm_epsilon")?.unwrap_or(1e-5) as f32;
    Ok(Family {
        model_type: "gpt2".to_owned(),
        hidden: sizes.hidden,
        vocabulary: sizes.vocabulary,
        positions: sizes.positions,
        embed: Embed { weight: format!("{embed_path}.weight"), scale: 1.0, positions: Some(positions) },
        norms: Norms { kind: NormKind::Layer, epsilon },
        blocks: (0..sizes.layers).map(block).collect(),
        last_norm: Some("transformer.ln_f".to_owned()),
        head_weight: head_weight(fields, true, &embed_path)?,
        head_softcap: None,
        embed_path,
    })
}

/// As many key heads as query heads, no window, no rotation.
fn whole_heads(sizes: &Sizes, head_dim: usize, scale: f64) -> Attend {
    Attend {
        heads: sizes.heads,
        kv_heads: sizes.heads,
        head_dim,
        scale: scale as f32,
        softcap: None,
        window: None,
        rotary: None,
    }
}

fn opt(fields: &Fields<'_>) -> Result<Family, FamilyError> {
    let sizes = Sizes::read(fields, USUAL)?;
    let projected = fields.optional_size("word_embed_proj_dim", WIDTH)?;
    if projected.is_some_and(|width| width != sizes.hidden) {
        let expected = format!("the width, {}: projected embeddings are not computed here", sizes.hidden);
        return Err(fields.refuse("word_embed_proj_dim", expected));
    }
    if !fields.flag("layer_norm_elementwise_affine", true)? {
        return Err(fields.refuse("layer_norm_elementwise_affine", "true: norms have weights"));
    }
    let head_dim = sizes.head_dim(fields, USUAL[1])?;
    let stored = Stored { transposed: false, bias: fields.flag("enable_bias", true)? };
    let width = fields.size("ffn_dim", WIDTH)?;
    let gating = gating(fields, "activation_function", "relu")?;
    let before = fields.flag("do_layer_norm_before", true)?;
    let around = |norm| match before {
        true => Around { before: Some(norm), ..Around::default() },
        false => Around { after: Some(norm), ..Around::default() },
    };
    let block = |index: usize| Block {
        path: format!("model.decoder.layers.{index}"),
        around_attention: around("self_attn_layer_norm"),
        attention: Attention {
            path: "self_attn",
            inputs: &["q_proj", "k_proj", "v_proj"],
            inputs_stored: stored,
            head_norms: None,
            output: "out_proj",
            output_stored: stored,
            attend: whole_heads(&sizes, head_dim, (head_dim as f64).sqrt().recip()),
        },
        around_mlp: around("final_layer_norm"),
        mlp: Mlp {
            path: "",
            names: MlpNames::Plain { up: "fc1", down: "fc2" },
            stored,
            width,
            gating,
            experts: None,
        },
    };
    let last_norm = before && !fields.flag("_remove_final_layer_norm", false)?;
    let positions = Positions { weight: "model.decoder.embed_positions.weight".to_owned(), offset: 2 };
    let embed_path = "model.decoder.embed_tokens".to_owned();
    Ok(Family {
        model_type: "opt".to_owned(),
        hidden: sizes.hidden,
        vocabulary: sizes.vocabulary,
        positions: sizes.positions,
        embed: Embed { weight: format!("{embed_path}.weight"), scale: 1.0, positions: Some(positions) },
        norms: Norms { kind: NormKind::Layer, epsilon: 1e-5 },
        blocks: (0..sizes.layers).map(block).collect(),
        last_norm: last_norm.then(|| "model.decoder.final_layer_norm".to_owned()),
        head_weight: head_weight(fields, true, &embed_path)?,
        head_softcap: None,
        embed_path,
    })
}
