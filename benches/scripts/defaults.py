"""The table behind the defaults: variants of the rounding settings on real models, one line each.

    cargo build --release
    python benches/scripts/defaults.py [--bits 3 2] MODEL CALIBRATION EVAL [--binary target/release/halfstep]
        [--variants fast|all|NAME,..]

Needs only Python's standard library: `halfstep eval` measures top-1, agreement and SQNR against the original.
Prints a Markdown table: variant, sum of layer objectives, top-1, agreement, SQNR, wall seconds.
"""
import argparse
import json
import pathlib
import subprocess
import tempfile
import time

FROM_NEAREST = ["--start", "nearest"]
FROM_GPTQ = ["--start", "gptq"]
UNREFINED = ["--refine-sweeps", "0"]
MAX_ABS = ["--range", "min-max"]


def adaround(iterations, *more):
    return ["--iterations", str(iterations), *more]


VARIANTS = {
    "nearest, max-abs range": adaround(0, *FROM_NEAREST, *UNREFINED, *MAX_ABS),
    "nearest": adaround(0, *FROM_NEAREST, *UNREFINED),
    "refine only, max-abs range": adaround(0, *FROM_NEAREST, *MAX_ABS),
    "refine only": adaround(0, *FROM_NEAREST),
    "gptq": adaround(0, *FROM_GPTQ, *UNREFINED),
    "gptq + refine": adaround(0, *FROM_GPTQ),
    **{f"adaround {n}": adaround(n, *FROM_NEAREST, *UNREFINED) for n in (100, 300, 1000, 10000)},
    **{f"adaround {n} + refine": adaround(n, *FROM_NEAREST) for n in (100, 300, 1000, 10000)},
    "gptq + adaround 300 + refine": adaround(300, *FROM_GPTQ),
    "gptq + adaround 1000 + refine": adaround(1000, *FROM_GPTQ),
    "gptq + adaround 300 + refine, max-abs range": adaround(300, *FROM_GPTQ, *MAX_ABS),
    "gptq + adaround 300 + refine, independent": adaround(300, *FROM_GPTQ, "--propagation", "independent"),
    "gptq + adaround 300 + refine, damping 1e-3": adaround(300, *FROM_GPTQ, "--damping", "0.001"),
    "gptq + adaround 300 + refine, damping 5e-2": adaround(300, *FROM_GPTQ, "--damping", "0.05"),
    "samples 300 + refine": adaround(300, *FROM_NEAREST, "--objective", "samples"),
    "samples 1000 + refine": adaround(1000, *FROM_NEAREST, "--objective", "samples"),
    "samples 10000 + refine": adaround(10000, *FROM_NEAREST, "--objective", "samples", "--learning-rate", "0.01"),
}
SLOW = ("adaround 10000", "adaround 10000 + refine", "samples 1000 + refine", "samples 10000 + refine")


def run(args, model, calibration, data, bits, options):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out"
        begun = time.time()
        subprocess.run(
            [args.binary, "quantize", model, "--calibration", calibration, "--bits", str(bits), "--output", str(out),
             "--quiet", *options], check=True)
        seconds = time.time() - begun
        layers = json.loads((out / "report.json").read_text())["layers"]
        objective = sum(l["solved"]["objective"] for l in layers if "solved" in l)
        rows = json.loads(subprocess.run(
            [args.binary, "eval", str(out / "model.onnx"), "--reference", model, "--data", data, "--json"],
            check=True, capture_output=True, text=True).stdout)
        return objective, rows[-1], seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("eval")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--binary", default="target/release/halfstep")
    parser.add_argument("--variants", default="fast")
    args = parser.parse_args()
    names = [n for n in VARIANTS if n not in SLOW] if args.variants == "fast" else list(VARIANTS)
    if args.variants not in ("fast", "all"):
        names = args.variants.split(";")
    print("| bits | variant | objective | top-1 | agreement | SQNR dB | seconds |\n|---|---|---|---|---|---|---|")
    for bits in args.bits:
        for name in names:
            options = VARIANTS[name] if name in VARIANTS else name.split()
            objective, row, seconds = run(args, args.model, args.calibration, args.eval, bits, options)
            print(f"| {bits} | {name} | {objective:.4g} | {row['top1']:.4f} | {row['agreement']:.4f} | "
                  f"{row['sqnr_db']:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
