"""Loads output of Halfstep in the programs that it is for, and compares it with the model that it stands for.

    python3 -m venv V && . V/bin/activate
    pip install torch transformers accelerate                                               # the model it stands for
    pip install optimum 'setuptools>=84' && pip install --no-build-isolation gptqmodel      # for --format gptq, gptq-v2
    pip install compressed-tensors                                                          # for --format compressed-tensors
    pip install gguf llama-cpp-python                                                       # for --format gguf
    halfstep quantize MODEL --calibration DATA --bits 4 --group-size 64 --format gptq --output OUT
    python benches/scripts/loaders.py MODEL TOKENS.npz:ARRAY OUT [OUT ..] [--windows 4] [--binary target/release/halfstep]

The model that it stands for, in transformers and f32: MODEL with the weights of OUT's packed words as NumPy reads them here
(GPTQ, compressed-tensors), or with all tensors as PyPI's `gguf` reads them (GGUF; heads put back in order). No GPU is needed. Seen with torch
2.15, transformers 5.23, compressed-tensors 0.20, gptqmodel 7.7, optimum 2.3, gguf 0.19, llama-cpp-python 0.3.36.

Prints a Markdown row for each OUT and program: perplexity of the original, of what OUT stands for, of OUT in the program and
(not GGUF, with --binary) by `halfstep eval`, and the largest difference of a logit. llama.cpp multiplies blocks with activations
that it rounds to 8 bits, so it runs twice: as it is, and with the same file's weights as f32, where only sums differ.
Its tokens for the windows' text must be those of the checkpoint's tokenizer. Fails where perplexities differ by more than
1e-3, but for rounded activations.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM

PERPLEXITY_DIFFERS_BY_MOST = 1e-3
ROUNDED = "llama.cpp, activations of 8 bits"
MODULES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def fields(words, bits, count):
    """`[rows, words]` int32 -> `[rows, count]`: each row a stream of `bits`, lowest first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, :count * bits].reshape(len(words), count, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(-1)


def packed_weights(folder):
    """Name and f32 matrix of every packed layer, GPTQ or compressed-tensors."""
    from safetensors import safe_open
    settings = quantization(folder)
    read, mark = {"gptq": (gptq_matrix, ".qweight"), "compressed-tensors": (compressed_matrix, ".weight_packed")}[
        settings["quant_method"]]
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for name in (name for name in tensors.keys() if name.endswith(mark)):
                module = name.removesuffix(mark)
                part = lambda suffix: tensors.get_tensor(f"{module}.{suffix}")
                as_f32 = lambda suffix: part(suffix).float().numpy()
                yield f"{module}.weight", read(settings, lambda suffix: part(suffix).numpy(), as_f32)


def gptq_matrix(settings, words, numbers):
    before = {"gptq": 1, "gptq_v2": 0}[settings["checkpoint_format"]]
    groups_of = words("g_idx")
    # The shapes say the settings of each layer.
    inputs, bits = len(groups_of), words("qweight").shape[0] * 32 // len(groups_of)
    integers = fields(words("qweight").T, bits, inputs)
    zero = fields(words("qzeros"), bits, len(integers)).T + before
    return (integers - zero[:, groups_of]).astype(np.float32) * numbers("scales").T[:, groups_of]


def compressed_matrix(settings, words, numbers):
    """One group of settings, which all layers share."""
    [group] = settings["config_groups"].values()
    bits, symmetric = group["weights"]["num_bits"], group["weights"]["symmetric"]
    rows, cols = words("weight_shape")
    integers, scales = fields(words("weight_packed"), bits, cols), numbers("weight_scale")
    zero = np.full(scales.shape, 1 << (bits - 1)) if symmetric else fields(words("weight_zero_point").T, bits, rows).T
    group_of = np.arange(cols) // (cols // scales.shape[1])
    return (integers - zero[:, group_of]).astype(np.float32) * scales[:, group_of]


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def gguf_file(folder):
    import gguf
    reader = gguf.GGUFReader(folder / "model.gguf")
    return reader, {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def gguf_weights(folder):
    """Name and f32 tensor of everything in the file."""
    import gguf
    reader, values = gguf_file(folder)
    arch = values["general.architecture"]
    heads = {"attn_q": values[f"{arch}.attention.head_count"], "attn_k": values[f"{arch}.attention.head_count_kv"]}
    for tensor in reader.tensors:
        shape = tuple(int(dim) for dim in reversed(tensor.shape))
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
        *block, module, part = tensor.name.split(".")
        if tensor.name == "rope_freqs.weight":
            continue
        if arch == "llama" and module in heads:
            count = heads[module]
            weight = weight.reshape(count, shape[0] // count // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        name = f"model.layers.{block[1]}.{MODULES[module]}" if block else names[module]
        yield f"{name}.{part}", np.ascontiguousarray(weight)


def measure(logits_of, windows):
    """Perplexity over all windows, and the logits."""
    all_logits, loss, count = [], 0.0, 0
    for window in windows:
        logits = logits_of(window)
        loss += torch.nn.functional.cross_entropy(logits[:-1].double(), window[1:], reduction="sum").item()
        count += len(window) - 1
        all_logits.append(logits)
    return float(np.exp(loss / count)), torch.stack(all_logits)


def by_transformers(model):
    model.eval()

    def logits_of(window):
        with torch.no_grad():
            return model(window[None]).logits[0].float()
    return logits_of


def by_loader(folder, layers, windows):
    options = {}
    if quantization(folder)["quant_method"] == "compressed-tensors":
        from transformers import CompressedTensorsConfig
        # Without it, transformers 5.23 expects zero points of another shape.
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)
    packed = [type(module).__name__ for module in model.modules() if hasattr(module, "qweight")]
    if not options and len(packed) != layers:
        sys.exit(f"{folder}: {len(packed)} layers were loaded packed, expected {layers}")
    name = " and ".join(sorted(set(packed))) or "dequantized"
    yield f"transformers, {name}", *measure(by_transformers(model), windows)


def by_llama_cpp(folder, windows, tokenizer):
    import llama_cpp

    def run(path, name):
        model = llama_cpp.Llama(str(path), n_ctx=windows.shape[1], n_batch=windows.shape[1], n_ubatch=windows.shape[1],
                                logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False)
        for window in windows if tokenizer else []:
            text = tokenizer.decode(window.tolist(), skip_special_tokens=False)
            ours, theirs = tokenizer.encode(text).ids, model.tokenize(text.encode(), add_bos=True, special=True)
            if ours != theirs:
                sys.exit(f"{path}: llama.cpp reads {theirs[:20]}.., the tokenizer {ours[:20]}.. in {text[:60]!r}")

        def logits_of(window):
            model.reset()
            model.eval(window.tolist())
            return torch.from_numpy(model.scores[:len(window)].copy())
        return name, *measure(logits_of, windows)

    yield run(folder / "model.gguf", ROUNDED)
    with tempfile.TemporaryDirectory() as place:
        plain = pathlib.Path(place, "plain.gguf")
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
        if llama_cpp.llama_model_quantize(str(folder / "model.gguf").encode(), str(plain).encode(), settings) != 0:
            sys.exit(f"{folder}: llama.cpp does not turn its weights into f32")
        yield run(plain, "llama.cpp, weights as f32")


def by_halfstep(binary, folder, windows):
    with tempfile.TemporaryDirectory() as place:
        tokens = pathlib.Path(place, "tokens.npy")
        np.save(tokens, windows.numpy())
        rows = subprocess.run([binary, "eval", str(folder), "--data", str(tokens), "--json"],
                              check=True, capture_output=True, text=True).stdout
        return f"{json.loads(rows)[-1]['perplexity']:.5f}"


def described(folder):
    if (folder / "model.gguf").exists():
        reader, values = gguf_file(folder)
        kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
        return f"gguf, {values['general.architecture']}, {' '.join(kinds)}"
    settings = quantization(folder)
    if settings["quant_method"] == "compressed-tensors":
        weights = settings["config_groups"]["group_0"]["weights"]
        settings = {"bits": weights["num_bits"], "group_size": weights["group_size"] or -1, "sym": weights["symmetric"]}
    kind = settings.get("checkpoint_format", "compressed-tensors")
    scheme = "symmetric" if settings["sym"] else "asymmetric"
    return f"{kind}, W{settings['bits']} g{settings['group_size']} {scheme}"


def compare(args, windows, folder):
    """Rows of the table, and whether all is well."""
    is_gguf = (folder / "model.gguf").exists()
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    original, _ = measure(by_transformers(plain), windows)
    weights = {name: torch.from_numpy(weight) for name, weight in (gguf_weights if is_gguf else packed_weights)(folder)}
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if plain.config.tie_word_embeddings else set()
    if unexpected or not weights or (is_gguf and set(missing) - tied):
        sys.exit(f"{folder}: not {args.model}'s: {unexpected[:3]}; missing {missing[:3]}; {len(weights)} found")
    plain.tie_weights()
    expected, wanted = measure(by_transformers(plain), windows)
    if is_gguf:
        from tokenizers import Tokenizer
        path = pathlib.Path(args.model, "tokenizer.json")
        runs = by_llama_cpp(folder, windows, Tokenizer.from_file(str(path)))
    else:
        runs = by_loader(folder, len(weights), windows)
    ours = by_halfstep(args.binary, folder, windows) if args.binary and not is_gguf else ""
    rows, good = [], True
    for name, actual, got in runs:
        apart, size = (got - wanted).abs().max().item(), wanted.abs().max().item()
        rows.append(f"| {described(folder)} | {name} | {original:.3f} | {expected:.5f} | {actual:.5f} | {ours} | "
                    f"{apart:.1e} of {size:.0f} |")
        good &= name == ROUNDED or abs(actual - expected) <= PERPLEXITY_DIFFERS_BY_MOST
    return rows, good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", help="FILE.npz:ARRAY, [windows, tokens]")
    parser.add_argument("outputs", nargs="+", type=pathlib.Path)
    parser.add_argument("--windows", type=int, default=4, help="evenly spaced, of those in the file (default 4)")
    parser.add_argument("--binary", help="halfstep, to evaluate the same windows")
    args = parser.parse_args()
    file, array = args.tokens.rsplit(":", 1)
    all_windows = np.load(file)[array].astype(np.int64)
    windows = torch.from_numpy(all_windows[np.linspace(0, len(all_windows) - 1, args.windows).astype(int)])
    results = [compare(args, windows, folder) for folder in args.outputs]
    print("| output | read by | original | expected | perplexity | halfstep eval | logits differ by |")
    print("|" + "---|" * 7)
    for rows, _ in results:
        print("\n".join(rows))
    if not all(good for _, good in results):
        sys.exit(f"perplexities differ by more than {PERPLEXITY_DIFFERS_BY_MOST}")


if __name__ == "__main__":
    main()
