"""Losses of a tiny run in every FP8 recipe and in bf16.

    python tests/bench/bench_fp8.py [--steps 200] [--flag value ...]

Trains examples/olmoe_1b_7b/tiny.yaml on mock data once per FP8 recipe, from the same weights on the
same samples. Prints the curves, then the ratio to bf16 of the mean loss of the last tenth.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
RECIPES = {
    "bf16": [],
    "delayed": ["--fp8-format", "hybrid", "--fp8-recipe", "delayed"],
    "tensorwise": ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"],
    "blockwise": ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"],
    "mxfp8": ["--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"],
}
POINTS = 10


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options, flags = parser.parse_known_args()
    curves = {name: losses(options.steps, [*own, *flags]) for name, own in RECIPES.items()}
    print(f"{'step':>6}" + "".join(f"{name:>12}" for name in curves))
    for step in np.linspace(1, options.steps, POINTS + 1).astype(int):
        print(f"{step:>6}" + "".join(f"{curve[step - 1]:>12.4f}" for curve in curves.values()))
    ends = {name: curve[-max(options.steps // 10, 1) :].mean() for name, curve in curves.items()}
    ratios = "".join(f"{end / ends['bf16']:>12.4f}" for end in ends.values())
    print(f"{'/ bf16':>6}{ratios}")


def losses(steps: int, flags: list[str]) -> np.ndarray:
    """Train; return the loss of every step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "pretrain_moe.py"), "--bf16", "--eval-iters", "0"]
        command += ["--config", str(ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml")]
        command += ["--save", folder, "--train-iters", str(steps), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([json.loads(line)["lm_loss"] for line in lines])


if __name__ == "__main__":
    main()
