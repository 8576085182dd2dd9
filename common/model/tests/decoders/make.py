"""Writes the golden decoders of this folder: tiny checkpoints of every family with random weights, and what
`transformers` computes with them.

Run: `python make.py`, with torch (CPU) and transformers 5.23. Each case is a folder: `config.json` and
`model.safetensors` as `save_pretrained` writes them, `old.json` where configurations of transformers 4 spell the same
model differently, and `expected/`, in the form of a checkpoint: `tokens` [2, 9], -1 behind the shorter sequence;
`logits` [14, vocabulary]; `input:NODE`, the rows that product NODE gets, `output:NODE` of routers (the weights of the
experts, 0 for those not chosen). Rows of the two sequences follow each other; each was computed by itself.

Weights are large enough that softcaps bite and softmaxes are not flat; windows and stretched positions begin within
the longer sequence.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parent
LENGTHS = [9, 5]

USUAL = dict(
    vocab_size=37, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
NO_WINDOW = dict(sliding_window=None)
GEMMA = USUAL | dict(
    hidden_size=24, head_dim=8, query_pre_attn_scalar=10, sliding_window=4, attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
)
GPT2 = dict(vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
OPT = dict(
    vocab_size=37, hidden_size=16, num_hidden_layers=2, ffn_dim=20, max_position_embeddings=16,
    num_attention_heads=4, word_embed_proj_dim=16,
)
QWEN3_MOE = USUAL | dict(head_dim=6, moe_intermediate_size=10, num_experts=4, num_experts_per_tok=2)


def rope(kind, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1000.0, **more))


CASES = {
    "llama": ("Llama", USUAL | rope("default")),
    "llama_bias": ("Llama", USUAL | dict(attention_bias=True, mlp_bias=True, head_dim=6, tie_word_embeddings=True)),
    "llama_linear": ("Llama", USUAL | rope("linear", factor=3.0)),
    "llama_dynamic": ("Llama", USUAL | rope("dynamic", factor=2.0) | dict(head_dim=8, max_position_embeddings=6)),
    "llama_llama3": (
        "Llama",
        USUAL | dict(head_dim=8) | rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama_yarn": (
        "Llama", USUAL | dict(head_dim=8)
        | rope("yarn", factor=4.0, beta_fast=4.0, original_max_position_embeddings=64),
    ),
    "mistral_window": ("Mistral", USUAL | dict(sliding_window=4)),
    "mistral_yarn": (
        "Mistral",
        USUAL | NO_WINDOW | dict(head_dim=8) | rope(
            "yarn", factor=4.0, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.8, truncate=False,
            original_max_position_embeddings=64),
    ),
    "qwen2": ("Qwen2", USUAL | dict(tie_word_embeddings=True, sliding_window=4)),
    "qwen2_window": ("Qwen2", USUAL | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("Qwen3", USUAL | dict(head_dim=6)),
    "phi3": ("Phi3", USUAL | dict(sliding_window=4)),
    "phi3_longrope": (
        "Phi3",
        USUAL | dict(hidden_size=32, original_max_position_embeddings=6) | rope(
            "longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 2.0, 4.0]),
    ),
    "gemma2": ("Gemma2", GEMMA),
    "gemma2_bf16": ("Gemma2", GEMMA),
    "gemma3": (
        "Gemma3",
        GEMMA | dict(
            num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            attn_logit_softcapping=None,
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
                full_attention=dict(rope_type="linear", factor=2.0, rope_theta=10000.0),
            ),
        ),
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2_by_layer": ("GPT2", GPT2 | dict(n_inner=12, scale_attn_by_inverse_layer_idx=True)),
    "opt": ("OPT", OPT),
    "opt_norm_after": ("OPT", OPT | dict(do_layer_norm_before=False, activation_function="gelu")),
    "mixtral": ("Mixtral", USUAL | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3Moe", QWEN3_MOE | dict(norm_topk_prob=False, decoder_sparse_step=1)),
    "qwen3_moe_dense_layer": ("Qwen3Moe", QWEN3_MOE | dict(norm_topk_prob=True, mlp_only_layers=[0])),
}

HEADS = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def fill(model, generator):
    """Random weights: products that keep the size of what passes, norms around 1, biases that matter."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name or ".ln_" in name:
            centre = 0.0 if "Gemma" in type(model).__name__ or name.endswith("bias") else 1.0
            weight.data = centre + 0.3 * noise
        elif weight.dim() == 1:
            weight.data = 0.3 * noise
        elif "embed" in name or ".wte" in name or ".wpe" in name:
            weight.data = noise
        else:
            inputs = weight.shape[0] if ".c_" in name else weight.shape[-1]
            weight.data = 2.0 * noise / inputs**0.5


class Taps:
    """Inputs of every product, by its name in the checkpoint."""

    def __init__(self, model):
        self.found = {}
        for name, module in model.named_modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)):
                module.register_forward_pre_hook(lambda _, args, name=name: self.add(f"input:{name}", args[0]))
            elif type(module).__name__ in ("MixtralExperts", "Qwen3MoeExperts"):
                module.register_forward_pre_hook(lambda m, args, name=name: self.experts(m, name, *args))

    def add(self, name, value):
        self.found.setdefault(name, []).append(value.detach().reshape(-1, value.shape[-1]).float())

    def experts(self, module, name, hidden, chosen, weights):
        gate, up, down = "gate_proj", "up_proj", "down_proj"
        if type(module).__name__ == "MixtralExperts":
            name, (gate, up, down) = name.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
        everything = torch.zeros(hidden.shape[0], module.num_experts)
        self.add(f"output:{name.removesuffix('experts')}route", everything.scatter(1, chosen, weights))
        for expert in range(module.num_experts):
            rows = hidden[(chosen == expert).any(1)]
            halves = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            self.add(f"input:{name}.{expert}.{gate}", rows)
            self.add(f"input:{name}.{expert}.{up}", rows)
            self.add(f"input:{name}.{expert}.{down}", module.act_fn(halves[0]) * halves[1])


def old(config):
    """The same configuration as transformers 4 wrote it; None where it is spelt the same."""
    config = dict(config)
    parameters = config.pop("rope_parameters", None)
    if parameters is None:
        return None
    config["torch_dtype"] = config.pop("dtype")
    if "sliding_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    parameters = dict(parameters)
    config["rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        config["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else dict(type=kind, **parameters)
    return config


def load(folder, cls, dtype):
    """Computes in f32 whatever the checkpoint's type, as we do; but the scale of Gemma's embedding is rounded to it."""
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    if dtype == torch.bfloat16:
        scale = model.model.embed_tokens.embed_scale
        model.model.embed_tokens.embed_scale.data = scale.bfloat16().float()
    return model.eval()


def make(name, family, settings):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(20261124 + sum(name.encode()))
    config = getattr(transformers, CONFIGS.get(family, family + "Config"))(**settings)
    model = getattr(transformers, HEADS.get(family, family + "ForCausalLM"))(config)
    fill(model, generator)
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    model = model.to(dtype)
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    spelt_old = old(json.loads((folder / "config.json").read_text()))
    if spelt_old:
        (folder / "old.json").write_text(json.dumps(spelt_old, indent=2) + "\n")

    tokens = torch.full((len(LENGTHS), max(LENGTHS)), -1, dtype=torch.int64)
    found, logits = {}, []
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = torch.randint(0, config.vocab_size, (length,), generator=generator)
        # A model of its own per sequence: stretched positions remember the longest sequence they have seen.
        model = load(folder, type(model), dtype)
        taps = Taps(model)
        with torch.no_grad():
            logits.append(model(tokens[row : row + 1, :length]).logits[0])
        for key, values in taps.found.items():
            found.setdefault(key, []).extend(values)
    expected = {key: torch.cat(values).contiguous() for key, values in found.items()}
    expected |= {"tokens": tokens, "logits": torch.cat(logits).contiguous()}
    (folder / "expected").mkdir()
    save_file(expected, folder / "expected" / "model.safetensors")
    (folder / "expected" / "config.json").write_text("{}\n")
    spread = expected["logits"].std().item()
    print(f"{name}: {len(expected)} tensors, logits spread {spread:.2f}")


if __name__ == "__main__":
    for name, (family, settings) in CASES.items():
        make(name, family, settings)
