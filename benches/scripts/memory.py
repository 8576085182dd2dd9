"""Peak memory of `halfstep quantize` on a checkpoint, under a hard limit of a fraction of its size.

    cargo build --release
    python ../shared/models/build/synthetic_llama.py big 2048 5632 22 32 4 32000 bf16
    python benches/scripts/memory.py big [--limit 0.5] [--samples 4] [--sequence-length 128]
        [--binary target/release/halfstep] [-- OPTIONS OF quantize]

Needs Linux, a memory control group (version 1 or 2) that may be made, which root may, and only Python's standard
library. The calibration tokens are random. The group counts everything: the program's memory, and the file pages that
it has touched as far as they are not given back; whoever needs more than the limit is killed.
Prints a Markdown row: bytes on disk, limit, peak resident, of that anonymous and of files, peak of the group, seconds.
"""
import argparse
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path("/sys/fs/cgroup")


class Group:
    """A control group of this run alone."""

    def __init__(self, limit):
        self.two = (ROOT / "cgroup.controllers").exists()
        self.path = (ROOT if self.two else ROOT / "memory") / f"halfstep-{os.getpid()}"
        self.path.mkdir()
        (self.path / ("memory.max" if self.two else "memory.limit_in_bytes")).write_text(str(limit))

    def enter(self):
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self):
        return int((self.path / ("memory.peak" if self.two else "memory.max_usage_in_bytes")).read_text())

    def remove(self):
        self.path.rmdir()


def write_tokens(path, vocabulary, samples, length):
    """Random ids `[samples, length]` as a NumPy file."""
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({samples}, {length}), }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    draw = random.Random(0)
    ids = [draw.randrange(vocabulary) for _ in range(samples * length)]
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + struct.pack(f"<{len(ids)}q", *ids))


def status(pid):
    """Lines of /proc/PID/status that count memory, in bytes."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.startswith(("VmHWM", "RssAnon", "RssFile")))
    return {pair[0].rstrip(":"): int(pair[1]) * 1024 for pair in pairs}


def watch(process):
    """The largest of each line while the process lives."""
    most = {}
    while process.poll() is None:
        for key, value in status(process.pid).items():
            most[key] = max(most.get(key, 0), value)
        time.sleep(0.05)
    return most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--limit", type=float, default=0.5, help="of the weights' bytes (default 0.5)")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--binary", default="target/release/halfstep")
    own, options = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, options = own[:at], own[at + 1:]
    args = parser.parse_args(own)
    size = sum(file.stat().st_size for file in args.model.glob("*.safetensors"))
    limit = int(size * args.limit)
    vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory(dir=args.model.resolve().parent) as folder:
        folder = pathlib.Path(folder)
        write_tokens(folder / "tokens.npy", vocabulary, args.samples, args.sequence_length)
        command = [args.binary, "quantize", str(args.model), "--calibration", str(folder / "tokens.npy"),
                   "--output", str(folder / "out"), "--spill-dir", str(folder), "--quiet", *options]
        group = Group(limit)
        begun = time.time()
        process = subprocess.Popen(command, preexec_fn=group.enter)
        most = watch(process)
        seconds = time.time() - begun
        peak = group.peak()
        group.remove()
        if process.returncode not in (0, 3):
            sys.exit(f"quantize ended with {process.returncode} after {seconds:.0f} s; most seen: {most}, group {peak}")
        reported = json.loads((folder / "out" / "timing.json").read_text())["peak_resident_bytes"]
    mib = lambda value: f"{value / 2**20:.0f} MiB"
    cells = [size, limit, reported, most.get("RssAnon", 0), most.get("RssFile", 0), peak]
    print("| on disk | limit | peak resident | anonymous | of files | peak of the group | s |")
    print("|" + "---|" * 7)
    print("| " + " | ".join(map(mib, cells)) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main()
