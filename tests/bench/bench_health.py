"""Count false alarms of the health checks in a healthy run of the quick start's model.

    python -m tests.bench.bench_health --tokenizer-model quickstart/tokenizer \\
        --data-path quickstart/data/NAME ... [--steps 2000] [--save FOLDER]

One rank and one thread; half an hour on a free core. Exit code 1 for more than one alarm. With the
--save of an earlier run it continues or reads that run.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("loss_deviations", "grad_norm_deviations", "router_entropy", "expert_load_max_over_mean")
SETTLED = 200
"""First step of the extremes that are printed: experts start uneven."""


def main() -> int:
    """Train and print the alarms; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", nargs="+", required=True)
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.save or Path(temporary) / "run"
        words = [sys.executable, str(ROOT / "pretrain_moe.py")]
        words += ["--config", str(ROOT / "examples/quickstart/pretrain.yaml")]
        words += ["--expert-model-parallel-size", "1", "--cpu-threads", "1", "--eval-iters", "0"]
        words += ["--eval-interval", "none", "--no-tensorboard", "--save-interval", "500"]
        words += ["--train-iters", str(arguments.steps), "--save", str(folder)]
        words += ["--load", str(folder), "--tokenizer-model", arguments.tokenizer_model]
        last = rows(folder / "metrics.jsonl")[-1:]
        if not last or last[0]["step"] < arguments.steps:
            subprocess.run(
                [*words, "--data-path", *arguments.data_path],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=True,
            )
        return report(folder)


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, none if it is missing."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def report(folder: Path) -> int:
    """Print alarms and extremes of a run; return 1 for more than one alarm."""
    metrics, events = rows(folder / "metrics.jsonl"), rows(folder / "events.jsonl")
    print(
        f"{len(metrics):,} steps, {len(events)} alarms: {dict(Counter(e['kind'] for e in events))}"
    )
    for name in FIELDS:
        pairs = [
            (row[name], row["step"]) for row in metrics if row["step"] > SETTLED and name in row
        ]
        if pairs:
            (low, first), (high, last) = min(pairs), max(pairs)
            print(f"{name}: {low:.3g} (step {first}) to {high:.3g} (step {last})")
    norms = [row["grad_norm"] for row in metrics]
    ratios = [
        (norm * 128 / math.fsum(norms[n - 128 : n]), n + 1)
        for n, norm in enumerate(norms)
        if n >= 128
    ]
    if ratios:
        print("grad_norm over the mean of 128 steps: at most {:.3g} (step {})".format(*max(ratios)))
    return int(len(events) > 1)


if __name__ == "__main__":
    sys.exit(main())
