"""Train a tiny model in one layout, for comparison with one process.

`train` runs on every rank of a launch; `results_of` makes many runs of one size in one launch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import load_checkpoint, save_checkpoint
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.sinks import Row
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.loop import Loop
from moetron.moe.training.runtime import divide
from moetron.moe.training.sample_stream import Streams
from moetron.moe.verify.parity import Result
from tests.parallel.support.harness import run_each
from tests.parallel.support.sharded import assemble, local_moments

METRICS = (
    *("lm_loss", "grad_norm", "aux_loss", "z_loss", "dropped_fraction", "loss_tokens"),
    *("max_attention_logit", "preference_loss", "margin", "accuracy", "kl"),
)


class MaskedStream(MockStream):
    """Mock samples whose last n modulo 7 tokens have no loss, so that counts differ by rank.

    Their first token differs from those of the previous samples and occurs nowhere else. Two
    equal tokens at the start of sequences would have equal hidden states, and rounding
    would decide which of them a full expert drops.
    """

    _FIRST_TOKENS = 8
    """More than the samples of a micro-batch."""

    def __getitem__(self, n: int) -> dict[str, Any]:
        sample = super().__getitem__(n)
        sample["loss_mask"][self.seq_length - n % 7 :] = 0
        sample["tokens"] %= self.vocab_size - self._FIRST_TOKENS
        sample["tokens"][0] = self.vocab_size - 1 - n % self._FIRST_TOKENS
        return sample


class PackedStream(MaskedStream):
    """Samples of documents, one of them a single token, and 0 to 2 tokens of padding."""

    def __getitem__(self, n: int) -> dict[str, Any]:
        sample = super().__getitem__(n)
        padding, length = n % 3, self.seq_length
        lengths = [1, 2 + n % 5, padding]
        sample["loss_mask"][length - padding :] = 0
        sample["documents"] = np.array([*lengths[:2], length - sum(lengths), padding])
        return {**sample, "padding": padding}


class _Rows:
    """Sink that keeps the compared metrics."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def step(self, row: Row) -> None:
        self.rows.append({name: row[name] for name in METRICS if name in row})

    def validation(self, row: Row) -> None:
        raise AssertionError("these runs do not evaluate")

    def close(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """Settings, and the checkpoint that the run starts from (and writes first, if ``write``)."""

    settings: Settings
    weights: str
    write: bool = False
    samples: Callable[[int, int, int], Any] | None = None
    """Stream of a seed, size of the vocabulary and length; unset: `PackedStream` with
    --reset-attention-mask, else `MaskedStream`."""


def train(run: Run, steps: int, device: str) -> dict[str, Any]:
    """Run ``steps`` on the current ranks.

    Returns:
        ``rows``, `METRICS` of every step, and ``moments``: this rank's part of the optimizer's
        first moment after step 1, the clipped gradient times a factor.
    """
    settings, vocab_size = run.settings, run.settings.model.vocab_size
    assert vocab_size is not None
    here = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    trainer = build_trainer(settings, divide(settings, torch.device(here)), vocab_size)
    default = PackedStream if settings.data.reset_attention_mask else MaskedStream
    stream = (run.samples or default)(settings.training.seed, vocab_size, settings.model.seq_length)
    state = trainer.chunks, trainer.optimizer, settings, stream.state()
    if run.write:
        save_checkpoint(Path(run.weights), Progress(), *state)
    load_checkpoint(Path(run.weights), *state)
    sink = _Rows()
    loop = Loop(trainer, Streams(stream, None), Progress(), [sink], peak=None)
    batches = loop.batches()
    loop.step(batches, lambda: False)
    moments = local_moments(trainer)
    for _ in range(steps - 1):
        loop.step(batches, lambda: False)
    return {"rows": sink.rows, "moments": moments}


def results_of(
    runs: Mapping[str, Run],
    world_size: int,
    steps: int,
    device: str = "cpu",
    timeout_s: float = 120,
) -> Iterator[tuple[str, Result, list[Row]]]:
    """Yield (name, result, rows) of each run, all on the same ``world_size`` processes.

    ``timeout_s`` is that of one run.

    Raises:
        RankFailed: of the first run that fails.
        AssertionError: of the first run whose ranks disagree on a gradient or miss a part of it.
    """
    calls = [(run, steps, device) for run in runs.values()]
    ranks = run_each(train, world_size, calls, timeout_s, device)
    for name, results in zip(runs, ranks, strict=True):
        rows = results[0]["rows"]
        gradients = assemble(result["moments"] for result in results)
        losses, norms = ([row[key] for row in rows] for key in ("lm_loss", "grad_norm"))
        yield name, Result(losses, norms, gradients), rows
