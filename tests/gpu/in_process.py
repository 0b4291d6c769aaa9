"""Training runs one after the other in this process, on its GPU or else its CPU."""

import contextlib
import gc
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from moetron import assembly
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import load_weights
from moetron.moe.config.command import load
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.patching import Patch
from moetron.moe.monitoring.sinks import Row, Sink
from moetron.moe.routing.losses import forget_auxiliary_losses
from moetron.moe.routing.random_draws import Draws, derived_seed
from moetron.moe.training import runtime
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.loop import Loop
from moetron.moe.training.sample_stream import Streams
from moetron.moe.training.trainer import Trainer
from tests.gpu.samples import STREAMS


class Rows:
    """Sink that keeps every step's metrics."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def step(self, row: Row) -> None:
        self.rows.append(row)

    def expert_load(self, step: int, loads: Any) -> None: ...

    def validation(self, row: Row) -> None:
        self.rows.append(row)

    def event(self, row: Row) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def drawn_on_host() -> Iterator[None]:
    """Let routers draw from a CPU generator, so that all devices see the same numbers."""
    start = Draws.start

    def start_on_host(self: Any, layer: int) -> None:
        start(self, layer)
        seed = derived_seed(self._seed, layer, int(self.number))
        self.on_host = torch.Generator().manual_seed(seed)

    def uniform(self: Any, like_sbX: torch.Tensor) -> torch.Tensor:
        return torch.rand(like_sbX.shape, generator=self.on_host).to(like_sbX.device)

    changes = Patch(Draws, "start", start_on_host), Patch(Draws, "uniform", uniform)
    undo = [change.apply() for change in changes]
    try:
        yield
    finally:
        for change in undo:
            change.apply()


@contextlib.contextmanager
def one_run() -> Iterator[None]:
    """Keep a run's prints and warnings to itself, and leave nothing of it in the process."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        forget()


@contextlib.contextmanager
def built(settings: Settings) -> Iterator[Trainer]:
    """Start a run of one rank and build its model."""
    vocab_size = settings.model.vocab_size
    assert vocab_size is not None
    with one_run(), runtime.running(settings) as ranks:
        yield build_trainer(settings, ranks, vocab_size)


def pretrain(argv: Sequence[str], sinks: Sequence[Sink] = ()) -> None:
    """Run what ``pretrain_moe.py`` runs with these flags; ``sinks`` get the metrics too."""
    settings = load(argv).settings
    with one_run():
        code = assembly.train(settings, None, assembly.vocabulary_size(settings, None), sinks)
    assert code == 0


def forget() -> None:
    """Clear what megatron-core and Transformer Engine keep for the process after a run."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    forget_auxiliary_losses()
    MTPLossLoggingHelper.tracker.clear()
    with contextlib.suppress(ImportError):
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train(
    settings: Settings,
    steps: int,
    samples: str = "mock",
    weights: Path | None = None,
    before: Callable[[Trainer], None] | None = None,
    after: Callable[[Trainer], None] | None = None,
) -> list[Row]:
    """Train from step 0 with a fresh optimizer; return the metrics of each step.

    Routers draw on the host.

    Args:
        settings: of the run.
        steps: number of steps.
        samples: name in `STREAMS`.
        weights: checkpoint that gives the weights; None: newly initialised ones.
        before: called with the trainer before the first step; may change parameters.
        after: called with the trainer after the last step.
    """
    sink = Rows()
    with drawn_on_host(), built(settings) as trainer:
        if weights is not None:
            load_weights(weights, trainer.chunks, trainer.vocab_size)
        if before is not None:
            before(trainer)
        trainer.optimizer.reload_model_params()
        stream = STREAMS[samples](trainer.vocab_size, settings.model.seq_length)
        loop = Loop(trainer, Streams(stream, None), Progress(), [sink], peak=None)
        batches = loop.batches()
        for _ in range(steps):
            loop.step(batches, lambda: False)
        if after is not None:
            after(trainer)
    return sink.rows
