"""One decoder block of a large language model through `halfstep quantize`, and what the whole model would take.

    cargo build --release
    python benches/scripts/block.py llama-8b [--samples 512] [--sequence-length 2048] [--device auto]
        [--binary target/release/halfstep] [-- OPTIONS OF quantize]

Weights are random with the spread that trained ones have, and the vocabulary is small: times and memory mean something, accuracy does
not. Needs NumPy; memory of a GPU is read from `nvidia-smi` twice a second where there is one. Prints the phases of the run, then
Markdown: a row for the block, and the arithmetic for the model. A model's time is blocks times the block's; reading its embedding and
head, and loading the calibration text, is not in it.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

# Hidden, inner, query heads, key and value heads, width of a head, blocks of the model.
SHAPES = {
    "tiny": (256, 704, 8, 4, 32, 2),
    "llama-1b": (2048, 8192, 32, 8, 64, 16),
    "llama-8b": (4096, 14336, 32, 8, 128, 32),
    "llama-70b": (8192, 28672, 64, 8, 128, 80),
}
VOCABULARY = 1024


def bf16(values):
    """f32 as the upper halves of its words, rounded to nearest."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def tensors(shape, draw):
    hidden, inner, heads, kv_heads, width, _ = shape

    def weight(rows, cols):
        values = draw.standard_normal((rows, cols), dtype=np.float32) / np.float32(np.sqrt(cols))
        # Rows and columns of different size, as training leaves them.
        values *= np.exp(0.3 * draw.standard_normal((rows, 1), dtype=np.float32))
        values *= np.exp(0.3 * draw.standard_normal((1, cols), dtype=np.float32))
        return values

    block = "model.layers.0."
    yield "model.embed_tokens.weight", weight(VOCABULARY, hidden) * np.float32(np.sqrt(hidden))
    yield block + "input_layernorm.weight", np.ones(hidden, np.float32)
    for name, rows, cols in (
        ("self_attn.q_proj", heads * width, hidden),
        ("self_attn.k_proj", kv_heads * width, hidden),
        ("self_attn.v_proj", kv_heads * width, hidden),
        ("self_attn.o_proj", hidden, heads * width),
        ("mlp.gate_proj", inner, hidden),
        ("mlp.up_proj", inner, hidden),
        ("mlp.down_proj", hidden, inner),
    ):
        yield block + name + ".weight", weight(rows, cols)
    yield block + "post_attention_layernorm.weight", np.ones(hidden, np.float32)
    yield "model.norm.weight", np.ones(hidden, np.float32)
    yield "lm_head.weight", weight(VOCABULARY, hidden)


def write_checkpoint(folder, shape):
    hidden, inner, heads, kv_heads, width, _ = shape
    draw = np.random.default_rng(0)
    header, offset, parts = {}, 0, []
    for name, values in tensors(shape, draw):
        data = bf16(values)
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [offset, offset + data.nbytes]}
        offset += data.nbytes
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in parts:
            data.tofile(file)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return offset


class GpuMemory(threading.Thread):
    """The most memory in use on the first GPU while it runs, in MiB; None without `nvidia-smi`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.over = None, threading.Event()

    def run(self):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        while not self.over.wait(0.5):
            try:
                used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            except (OSError, ValueError, subprocess.CalledProcessError):
                return
            self.peak = max(self.peak or 0, used)


def main():
    own, rest = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--binary", default="target/release/halfstep")
    options = parser.parse_args(own)
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "model"
        folder.mkdir()
        size = write_checkpoint(folder, shape)
        ids = np.random.default_rng(1).integers(0, VOCABULARY, (options.samples, options.sequence_length))
        np.save(folder.parent / "tokens.npy", ids.astype(np.int64))
        print(f"{options.shape}: a block of {size / 1e6:.0f} MB, {ids.size} tokens", flush=True)
        output = folder.parent / "out"
        command = [
            options.binary, "quantize", str(folder), "--calibration", str(folder.parent / "tokens.npy"),
            "--samples", str(options.samples), "--sequence-length", str(options.sequence_length),
            "--bits", "4", "--group-size", "128", "--device", options.device, "--output", str(output), *rest,
        ]
        memory, begun = GpuMemory(), time.monotonic()
        memory.start()
        done = subprocess.run(command)
        seconds = time.monotonic() - begun
        memory.over.set()
        if done.returncode not in (0, 3, 4):
            sys.exit(f"quantize ended with {done.returncode} after {seconds:.0f} s")
        timing = json.loads((output / "timing.json").read_text())
    phases = {name: value for name, value in timing.items() if isinstance(value, (int, float))}
    print(json.dumps({"shape": options.shape, "tokens": int(ids.size), "seconds": round(seconds, 1), "exit": done.returncode,
                      "gpu_mib": memory.peak, **phases}))
    blocks, host = shape[-1], timing.get("peak_resident_bytes", 0) / 2**30
    gpu = "-" if memory.peak is None else f"{memory.peak / 1024:.1f} GiB"
    print("\n| block | tokens | s | GPU memory | host memory |\n|---|---|---|---|---|")
    print(f"| {options.shape} | {ids.size} | {seconds:.1f} | {gpu} | {host:.1f} GiB |")
    print(f"\n{blocks} blocks x {seconds:.1f} s = {blocks * seconds / 60:.0f} min")


if __name__ == "__main__":
    main()
