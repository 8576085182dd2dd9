"""Loads exported checkpoints as other programs do and compares them with the same weights in the plain.

Run: python load.py FOLDER, where FOLDER holds folders with `packed` and `plain` in each. Prints PASS or FAIL per
folder; exits with 1 if one fails. Needs numpy, safetensors, torch, transformers, compressed-tensors.

compressed-tensors: its library must unpack the same weights; transformers loads both and the logits must agree.
Asymmetric grids are loaded with `dequantize=True`, because transformers 5.23 with compressed-tensors 0.20 expects
unpacked zero points otherwise; that mode takes one group's settings for all layers, so where grids differ and some are
asymmetric the weights alone are compared.
GPTQ: unpacked here from the format's description, one bit at a time, and compared weight for weight; and loaded by
transformers as well where gptqmodel is installed.
"""

import importlib.util
import json
import re
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

warnings.filterwarnings("ignore")
# Both sides multiply the same f32 weights; only the order of sums may differ.
LOGITS_TOLERANCE = 1e-5
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
    if importlib.util.find_spec("gptqmodel") is None:
        return "weights equal"
    error = relative(logits(packed), logits(plain))
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


def main():
    failed = False
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        packed, plain = folder / "packed", folder / "plain"
        config = json.loads((packed / "config.json").read_text())["quantization_config"]
        check = check_gptq if config["quant_method"] == "gptq" else check_compressed
        try:
            print("PASS", folder.name, check(packed, plain, config), flush=True)
        except Exception as error:
            failed = True
            print("FAIL", folder.name, repr(error)[:600], flush=True)
            traceback.print_exc()
    sys.exit(failed)


if __name__ == "__main__":
    main()
