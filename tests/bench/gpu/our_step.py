"""Our training loop as a program to measure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.peak_flops import Peak
from moetron.moe.monitoring.sinks import Loads, Row
from moetron.moe.training import runtime
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.loop import Loop
from moetron.moe.training.sample_stream import SampleStream, Streams


class LastRow:
    """Sink that keeps every step's loss, as a file would."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, row: Row) -> None:
        """Keep the loss."""
        self.losses.append(row["lm_loss"])

    def validation(self, row: Row) -> None:
        """Ignore evaluations."""

    def expert_load(self, step: int, loads: Loads) -> None:
        """Ignore loads."""

    def event(self, row: Row) -> None:
        """Ignore events."""

    def rewind(self, step: int) -> None:
        """Do nothing; no run is set back."""

    def close(self) -> None:
        """Do nothing."""


class OurProgram:
    """The loop of pretrain_moe.py with its data loading, checks, routing counts and metrics.

    It writes no file and prints nothing.
    """

    def __init__(self, loop: Loop, sink: LastRow) -> None:
        self._loop = loop
        self._sink = sink
        self._batches = loop.batches()
        chunks = loop.trainer.chunks
        self.parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())

    def step(self) -> None:
        """Run a step of the loop."""
        self._loop.step(self._batches, lambda: False)

    def loss(self) -> float:
        """Return the loss of the last step."""
        return self._sink.losses[-1]

    @property
    def losses(self) -> list[float]:
        """Return the losses of all steps."""
        return self._sink.losses


@contextmanager
def our_program(
    settings: Settings, options: Mapping[str, Any], stream: SampleStream | None = None
) -> Iterator[OurProgram]:
    """Build our trainer and loop on ``stream``, by default synthetic samples."""
    assert not options, "ours takes flags"
    vocab_size, sink = settings.model.vocab_size, LastRow()
    assert vocab_size is not None
    if stream is None:
        stream = MockStream(settings.training.seed, vocab_size, settings.model.seq_length)
    with runtime.running(settings) as ranks:
        trainer = build_trainer(settings, ranks, vocab_size)
        loop = Loop(trainer, Streams(stream, None), Progress(), [sink], Peak(1.0, "none"))
        yield OurProgram(loop, sink)
