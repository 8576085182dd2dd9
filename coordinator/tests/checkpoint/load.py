"""Loads exported checkpoints as other programs do and compares them with the same weights in the plain.

Run: python load.py FOLDER, where FOLDER holds folders with `packed` and `plain` in each. Prints PASS or FAIL per
folder; exits with 1 if one fails. Needs numpy, safetensors, torch, transformers, compressed-tensors, gguf.

compressed-tensors: its library must unpack the same weights; transformers loads both and the logits must agree.
Asymmetric grids are loaded with `dequantize=True`, because transformers 5.23 with compressed-tensors 0.20 expects
unpacked zero points otherwise; that mode takes one group's settings for all layers, so where grids differ and some are
asymmetric the weights alone are compared.
GPTQ: unpacked here from the format's description, one bit at a time, and compared weight for weight; and loaded by
transformers as well where gptqmodel and optimum are installed, but for layers that differ (`dynamic`), which optimum does
not read.
GGUF: read and dequantized by its library and compared weight for weight, heads put back in order; where llama-cpp-python is
installed it computes the logits, from the file's weights turned into f32, because it rounds activations otherwise.
"""

import importlib.util
import json
import re
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig

warnings.filterwarnings("ignore")
# Both sides multiply the same f32 weights; only the order of sums may differ.
LOGITS_TOLERANCE = 1e-5
# llama.cpp raises the angle of a rotation step by step in f32.
LLAMA_TOLERANCE = 1e-4
TOKENS = torch.tensor([[1, 5, 9, 60, 33, 2, 17, 44, 8, 21, 3, 50]])


def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options).eval()
    with torch.no_grad():
        return model(TOKENS).logits.float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def tensors(folder):
    merged = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged.update(load_file(file))
    return merged


def fields(words, bits, count):
    """Streams along the last axis: field i is bits [i*b, i*b + b), least significant first, of 32-bit words."""
    words = np.ascontiguousarray(words).view(np.uint32)
    stream = (words[..., :, None] >> np.arange(32, dtype=np.uint32)) & 1
    stream = stream.reshape(*words.shape[:-1], -1)[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(-1)


def gptq_settings(config, module):
    """Settings of a module, None if it is left out."""
    settings = {key: config[key] for key in ("bits", "group_size", "sym")}
    for pattern, own in config.get("dynamic", {}).items():
        if re.match(pattern[2:], module):
            if pattern.startswith("-:"):
                return None
            settings.update(own)
    return settings


def gptq_weight(stored, module, config):
    settings = gptq_settings(config, module)
    bits, qweight = settings["bits"], stored[module + ".qweight"]
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    size = columns if settings["group_size"] == -1 else settings["group_size"]
    groups = stored[module + ".g_idx"]
    assert (groups == np.arange(columns) // size).all(), "groups out of order"
    q = fields(qweight.T, bits, columns)
    zeros = fields(stored[module + ".qzeros"], bits, rows) + (config["checkpoint_format"] == "gptq")
    assert not settings["sym"] or (zeros == 2 ** (bits - 1)).all(), "zero points off the middle"
    scales = stored[module + ".scales"]
    assert scales.dtype == np.float16 and scales.shape == (columns // size, rows)
    return ((q - zeros.T[:, groups]).astype(np.float32) * scales.astype(np.float32).T[:, groups]).astype(np.float32)


def check_gptq(packed, plain, config):
    stored, expected = tensors(packed), tensors(plain)
    for name, weight in expected.items():
        module = name.removesuffix(".weight")
        if name in stored:
            assert (stored[name] == weight).all(), name
            linear = ".layers." in name and weight.ndim == 2
            assert not linear or gptq_settings(config, module) is None, f"{name} is plain but not left out"
        else:
            assert (gptq_weight(stored, module, config) == weight).all(), f"{name} differs"
    # transformers with optimum gives every layer of a block the same settings.
    if importlib.util.find_spec("gptqmodel") is None or "dynamic" in config:
        return "weights equal"
    # Other kernels have group sizes that they take: not a whole row of 96.
    plainest = GPTQConfig(bits=config["bits"], backend="torch")
    error = relative(logits(packed, quantization_config=plainest), logits(plain))
    # Its kernels may multiply in half precision.
    assert error < 5e-3, f"logits differ by {error:.1e}"
    return f"weights equal, logits {error:.1e}"


def compressed_weights(packed, config):
    """Every packed weight through the format's own library, each with the settings of its group."""
    stored = {name: torch.from_numpy(value) for name, value in tensors(packed).items()}
    groups = list(config["config_groups"].values())
    for module in sorted(name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")):
        named = [group for group in groups if module in group["targets"]]
        assert named or groups[0]["targets"] == ["Linear"], f"{module} is in no group"
        weights = QuantizationArgs(**(named or groups)[0]["weights"])
        parts = {name.removeprefix(module + "."): stored[name] for name in stored if name.startswith(module + ".")}
        scheme = QuantizationScheme(targets=[module], weights=weights)
        yield module + ".weight", PackedQuantizationCompressor.decompress(parts, scheme)["weight"].numpy()


def check_compressed(packed, plain, config):
    expected = tensors(plain)
    for name, weight in compressed_weights(packed, config):
        assert (weight == expected[name]).all(), f"{name} differs"
    groups = [group["weights"] for group in config["config_groups"].values()]
    symmetric = all(weights["symmetric"] for weights in groups)
    if not symmetric and len(groups) > 1:
        return "weights equal"
    options = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    error = relative(logits(packed, **options), logits(plain))
    assert error < LOGITS_TOLERANCE, f"logits differ by {error:.1e}"
    return f"weights equal, logits {error:.1e}"


def check(packed, plain):
    if (packed / "model.gguf").exists():
        return check_gguf(packed, plain)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    return (check_gptq if config["quant_method"] == "gptq" else check_compressed)(packed, plain, config)


MODULES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens",
    "output_norm": "model.norm", "output": "lm_head",
}


def check_gguf(packed, plain):
    import gguf

    expected = tensors(plain)
    reader = gguf.GGUFReader(packed / "model.gguf")
    arch = reader.fields["general.architecture"].contents()
    heads = lambda key: reader.fields[f"{arch}.attention.{key}"].contents()
    found = set()
    for tensor in (tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"):
        *block, module, part = tensor.name.split(".")
        prefix = f"model.layers.{block[1]}." if block else ""
        name = f"{prefix}{MODULES[module]}.{part}"
        shape = expected[name].shape
        assert tuple(reversed(tensor.shape.tolist())) == shape, f"{name}: {tensor.shape} for {shape}"
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if arch == "llama" and module in ("attn_q", "attn_k"):
            count = heads("head_count" if module == "attn_q" else "head_count_kv")
            weight = weight.reshape(count, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        assert (weight == expected[name]).all(), f"{name} differs"
        found.add(name)
    assert found == set(expected), f"{found ^ set(expected)}"
    if importlib.util.find_spec("llama_cpp") is None:
        return "weights equal"
    error = relative(llama_logits(packed / "model.gguf"), logits(plain))
    assert error < LLAMA_TOLERANCE, f"logits differ by {error:.1e}"
    return f"weights equal, logits {error:.1e}"


def llama_logits(path):
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    with tempfile.TemporaryDirectory() as place:
        plain = f"{place}/plain.gguf"
        assert llama_cpp.llama_model_quantize(str(path).encode(), plain.encode(), settings) == 0
        model = llama_cpp.Llama(plain, n_ctx=64, logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False)
        model.eval(TOKENS[0].tolist())
        return torch.from_numpy(model.scores[: TOKENS.shape[1]].copy())[None]


def main():
    failed = False
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        packed, plain = folder / "packed", folder / "plain"
        try:
            print("PASS", folder.name, check(packed, plain), flush=True)
        except Exception as error:
            failed = True
            print("FAIL", folder.name, repr(error)[:600], flush=True)
            traceback.print_exc()
    sys.exit(failed)


if __name__ == "__main__":
    main()
