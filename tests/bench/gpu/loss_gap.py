"""Losses of variants of ours after some hundred steps on one stream: what a precision costs."""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moetron.data.stream.addresses import ENDLESS
from tests.bench.gpu.our_step import OurProgram
from tests.bench.gpu.variants import Variant, run_program, settings_of

ROOT = Path(__file__).parents[3]
LAST = 20
"""Steps whose mean loss is compared."""
FLAGS = shlex.split(
    "--seq-length 1024 --micro-batch-size 4 --global-batch-size 4 --lr-warmup-iters 20"
)
"""4,096 tokens a step, so that 200 steps take seconds; width, experts and layers as the bench."""


class Bytes:
    """The text of this checkout as tokens 0 to 255; sample n starts at a place drawn for n."""

    def __init__(self, seed: int, seq_length: int) -> None:
        self.source_names, self.objective_names = ["checkout"], ["causal"]
        self.bytes_per_token: list[float | None] = [1.0]
        self._seed = seed
        self._length = seq_length
        files = [path for end in ("md", "py") for path in ROOT.glob(f"*/**/*.{end}")]
        text = b"\n".join(path.read_bytes() for path in sorted(files))
        self._text = np.frombuffer(text, np.uint8)

    def __len__(self) -> int:
        """Return ``ENDLESS``."""
        return ENDLESS

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample ``n``."""
        last = len(self._text) - self._length
        start = int(np.random.default_rng([self._seed, n]).integers(last))
        tokens = self._text[start : start + self._length + 1].astype(np.int64)
        mask = np.ones(self._length, np.float32)
        rest = dict.fromkeys(("source", "objective", "prefix", "filtered"), 0)
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask, **rest}

    def state(self) -> dict[str, Any]:
        """Return what identifies the stream."""
        return {"checkout": {"bytes": len(self._text)}}


def run_losses(variants: Sequence[Variant], steps: int, flags: Sequence[str], folder: Path) -> None:
    """Train every variant, print its loss and the difference to the first; write losses.json."""
    found: dict[str, list[float]] = {}
    first = None
    for variant in variants:
        if variant.kind != "ours" or (reason := variant.why_not()):
            print(f"{variant.name}: left out: {reason if variant.kind == 'ours' else 'not ours'}")
            continue
        start = time.monotonic()
        settings = settings_of(variant, steps, [*FLAGS, *flags])

        def use(program: OurProgram) -> list[float]:
            for _ in range(steps):
                program.step()
            return program.losses

        stream = Bytes(settings.training.seed, settings.model.seq_length)
        try:
            losses = found[variant.name] = run_program(variant, settings, use, stream)
        except Exception as error:  # the others still run
            print(f"{variant.name}: {type(error).__name__}: {error}", flush=True)
            continue
        (folder / "losses.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        mean = fmean(losses[-LAST:])
        first = first or (variant.name, mean)
        print(
            f"{variant.name}: mean loss of the last {LAST} of {steps} steps {mean:.4f}, "
            f"{mean / first[1] - 1:+.3%} against {first[0]}; {time.monotonic() - start:.0f} s",
            flush=True,
        )
