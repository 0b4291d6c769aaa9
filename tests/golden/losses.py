"""Golden losses: metrics of five recipes over 20 steps, bit for bit on one platform.

    python -m tests.golden.losses --record [RECIPE ...]   # write this platform's file
    python -m tests.golden.losses [RECIPE ...]            # compare with it, print each difference

A refactoring must keep every bit. A change that is meant to alter the numbers records them again
and states the reason in its commit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
RECIPES = ("deepseek_v3", "mixtral_8x7b", "olmoe_1b_7b", "openmoe_8b", "st_moe_l")
STEPS = 20
METRICS = ("lm_loss", "grad_norm", "aux_loss", "z_loss")

Curve = dict[str, list[float]]
"""Metric -> its value at each step; floats in full precision."""


def platform_name() -> str:
    """Return what the bits depend on: torch's version, its CPU code path, the processor."""
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    processor = "-".join(fields.get(key, "unknown") for key in ("vendor_id", "cpu family", "model"))
    return f"torch-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}-{processor}"


def golden_file(platform: str) -> Path:
    """Return the file with the recorded losses of a platform."""
    return FOLDER / f"{platform}.json"


def train(
    recipe: str,
    python: str = sys.executable,
    ranks: int = 1,
    flags: Sequence[str] = ("--train-iters", str(STEPS)),
    save: Path | None = None,
) -> Curve:
    """Train the tiny form of a recipe in processes of its own, on mock data and one thread."""
    launcher = (
        [str(ROOT / "tools" / "launch.py"), "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        folder = str(save or temporary)
        command = [
            *(python, *launcher, str(ROOT / "pretrain_moe.py"), "--mock-data"),
            *("--config", str(ROOT / "examples" / recipe / "tiny.yaml"), "--save", folder),
            *("--lr-warmup-iters", "0", "--eval-iters", "0"),
            *("--cpu-threads", "1", "--no-tensorboard", *flags),
        ]
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{recipe}: exit code {done.returncode}\n{done.stderr}")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    return {name: [row[name] for row in rows] for name in METRICS if name in rows[0]}


def differences(found: Curve, expected: Curve) -> list[str]:
    """Return a line for each metric that differs: the first such step, and both values."""
    lines = []
    if found.keys() != expected.keys():
        lines.append(f"metrics {sorted(found)}, recorded {sorted(expected)}")
    for name in found.keys() & expected.keys():
        pairs = list(zip(found[name], expected[name], strict=True))
        first = next((step for step, (a, b) in enumerate(pairs, 1) if a != b), None)
        if first is not None:
            lines.append(
                f"{name} at step {first}: {pairs[first - 1][0]!r}, recorded {pairs[first - 1][1]!r}"
            )
    return lines


def main() -> int:
    """Record or compare; return 1 if a metric differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--record", action="store_true", help="write this platform's file")
    arguments = parser.parse_args()
    file = golden_file(platform_name())
    recorded: dict[str, Curve] = json.loads(file.read_text()) if file.exists() else {}
    failed = False
    for recipe in arguments.recipes:
        curve = train(recipe)
        if arguments.record:
            recorded[recipe] = curve
            print(f"{recipe}: recorded, last lm_loss {curve['lm_loss'][-1]!r}")
            continue
        lines = differences(curve, recorded.get(recipe, {}))
        failed = failed or bool(lines)
        print(f"{recipe}: {'; '.join(lines) or 'equal'}")
    if arguments.record:
        file.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
