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

NEAREST = ["--iterations", "0", "--refine-sweeps", "0"]
VARIANTS = {
    "nearest (max-abs)": NEAREST + ["--range", "min-max"],
    "nearest": NEAREST,
    "refine only": ["--iterations", "0"],
    "refine only (max-abs)": ["--iterations", "0", "--range", "min-max"],
    "gptq": ["--iterations", "0", "--refine-sweeps", "0", "--start", "gptq"],
    "gptq + refine": ["--iterations", "0", "--start", "gptq"],
    **{f"adaround {n}": ["--iterations", str(n), "--refine-sweeps", "0"] for n in (100, 300, 1000, 10000)},
    **{f"adaround {n} + refine": ["--iterations", str(n)] for n in (100, 300, 1000, 10000)},
    "gptq + adaround 300 + refine": ["--iterations", "300", "--start", "gptq"],
    "adaround 300 + refine, independent": ["--iterations", "300", "--propagation", "independent"],
    "adaround 300 + refine, max-abs": ["--iterations", "300", "--range", "min-max"],
    "adaround 300 + refine, damping 1e-4": ["--iterations", "300", "--damping", "0.0001"],
    "adaround 300 + refine, damping 1e-2": ["--iterations", "300", "--damping", "0.01"],
    "adaround 300 + refine, damping 3e-2": ["--iterations", "300", "--damping", "0.03"],
    "samples 1000 + refine": ["--objective", "samples", "--iterations", "1000"],
    "samples 10000 + refine": ["--objective", "samples", "--iterations", "10000", "--learning-rate", "0.001"],
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
