"""The table behind the defaults for language models: methods and grids on one checkpoint, one line each.

    cargo build --release
    python benches/scripts/language.py MODEL CALIBRATION EVAL [EVAL ..] [--binary target/release/halfstep]
        [--grids "W4 g64;W3 g64"] [--methods "gptq;gptq, refined"] [--jobs 4] [--threads 4] [--device cpu] [--json FILE]

CALIBRATION and EVAL: token ids as FILE.npz:ARRAY, or text. Needs only Python's standard library: `halfstep eval` measures
perplexity. Prints a Markdown table: grid, method, perplexity on each EVAL, the geometric mean over layers of the objective over that
of nearest rounding, wall seconds and processor seconds. Runs go on side by side, so compare processor seconds.
"""
import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

GRIDS = {
    "W4 per channel": ["--bits", "4"],
    "W4 g64": ["--bits", "4", "--group-size", "64"],
    "W3 g64": ["--bits", "3", "--group-size", "64"],
    "W3 g128 asymmetric": ["--bits", "3", "--group-size", "128", "--scheme", "asymmetric"],
}


def method(iterations, start, refine, fits, *more):
    options = ["--iterations", str(iterations), "--start", start, "--scale-fits", str(fits), *more]
    return options if refine else [*options, "--refine-sweeps", "0"]


METHODS = {
    "nearest, largest-weight range": method(0, "nearest", False, 0, "--range", "min-max"),
    "nearest": method(0, "nearest", False, 0),
    "gptq": method(0, "gptq", False, 0),
    "refined": method(0, "nearest", True, 0),
    "gptq, refined": method(0, "gptq", True, 0),
    **{f"gptq, refined, {n} scale fits": method(0, "gptq", True, n) for n in (1, 2, 4, 8)},
    **{f"adaround {n}": method(n, "nearest", False, 0) for n in (100, 300, 1000)},
    **{f"gptq, adaround {n}, refined": method(n, "gptq", True, 0) for n in (100, 300, 1000, 3000)},
    **{f"gptq, adaround {n}, refined, 4 scale fits": method(n, "gptq", True, 4) for n in (100, 300, 1000, 3000)},
    **{f"gptq, refined, 4 scale fits, damping {d}": method(0, "gptq", True, 4, "--damping", d)
       for d in ("0.003", "0.03", "0.05", "0.1", "0.2")},
    **{f"gptq, adaround 300, refined, 4 scale fits, damping {d}": method(300, "gptq", True, 4, "--damping", d)
       for d in ("0.05", "0.1")},
}


def run(args, grid, name, options):
    folder = pathlib.Path(tempfile.mkdtemp(dir=args.work))
    try:
        out = folder / "out"
        begun = time.time()
        command = [args.binary, "quantize", args.model, "--calibration", args.calibration, "--output", str(out), "--quiet",
                   "--format", "fake-quant", "--threads", str(args.threads), "--device", args.device, *GRIDS[grid], *options]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            return {"grid": grid, "method": name, "failed": (folder / "log").read_text()[-2000:]}
        seconds = time.time() - begun
        layers = json.loads((out / "report.json").read_text())["layers"]
        ratios = [l["solved"]["objective"] / l["solved"]["objective_nearest"] for l in layers if "solved" in l]
        ratio = math.exp(sum(math.log(max(r, 1e-30)) for r in ratios) / len(ratios))
        perplexities = []
        for data in args.eval:
            rows = json.loads(subprocess.run(
                [args.binary, "eval", str(out), "--data", data, "--threads", str(args.threads), "--json"],
                check=True, capture_output=True, text=True).stdout)
            perplexities.append(rows[-1]["perplexity"])
        return {"grid": grid, "method": name, "device": args.device, "perplexity": perplexities, "ratio": ratio, "seconds": seconds,
                "processor": usage.ru_utime + usage.ru_stime, "resident": usage.ru_maxrss * 1024}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def line(row):
    if "failed" in row:
        return f"| {row['grid']} | {row['method']} | failed: {row['failed']} |"
    figures = " | ".join(f"{p:.3f}" for p in row["perplexity"])
    return (f"| {row['grid']} | {row['method']} | {figures} | {row['ratio']:.3f} | {row['seconds']:.0f} | "
            f"{row['processor']:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("eval", nargs="+")
    parser.add_argument("--binary", default="target/release/halfstep")
    parser.add_argument("--grids", default=";".join(GRIDS))
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--only", action="append", help="GRID/METHOD, as often as wanted, instead of all pairs")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="what solves: cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--work", default=None, help="folder for what is made on the way")
    parser.add_argument("--json", default=None, help="one line of JSON for each run is added to this file")
    args = parser.parse_args()
    pairs = [tuple(p.split("/")) for p in args.only or []] or [
        (grid, name) for grid in args.grids.split(";") for name in args.methods.split(";")]
    print(f"| grid | method |{' | '.join(args.eval)} | ratio | seconds | processor |")
    print("|---" * (5 + len(args.eval)) + "|", flush=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for done in concurrent.futures.as_completed(
                [pool.submit(run, args, grid, name, METHODS[name]) for grid, name in pairs]):
            row = done.result()
            print(line(row), flush=True)
            if args.json:
                with open(args.json, "a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
