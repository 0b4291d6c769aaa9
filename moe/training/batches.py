"""Sample numbers of a rank's micro-batches, and their tensors.

Inside a global batch of samples ``first, first + 1, ...`` micro-batch m of data-parallel rank r
holds samples ``first + m * mbs * dp + r * mbs + [0, mbs)``, so that every layout forms the same
micro-batches. Every rank reads its own samples: nothing is broadcast, and a resume needs only the
number of consumed samples. Shape suffixes: B samples of a micro-batch, S full sequence.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moetron.common.parent_death import HelperContext
from moetron.common.stop_signal import held_back
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.schema.derived import global_batch_size_at
from moetron.moe.config.schema.settings import Settings
from moetron.moe.training.sample_stream import SampleStream

Batch = dict[str, torch.Tensor]
"""tokens, labels, position_ids: int64 [b, S]; loss_mask: float32 [b, S]; PER_SAMPLE: int64 [b]."""

PER_SAMPLE = ("source", "objective", "prefix", "filtered")
"""Fields with one value per sample."""

PADDING = -1
"""Sample number of padding: a row of zeros without loss."""


def micro_batch_numbers(
    first: int,
    count: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    padded_count: int | None = None,
) -> Iterator[list[int]]:
    """Yield the sample numbers of a rank's micro-batches among samples ``first + [0, count)``.

    ``padded_count`` rows are distributed instead of ``count``, the rest as ``PADDING``; they must
    fill the micro-batches of all ranks.
    """
    rows_in_all = count if padded_count is None else padded_count
    assert rows_in_all % (micro_batch_size * dp_size) == 0
    for start in range(dp_rank * micro_batch_size, rows_in_all, micro_batch_size * dp_size):
        rows = range(start, start + micro_batch_size)
        yield [first + row if row < count else PADDING for row in rows]


def training_numbers(
    settings: Settings, progress: Progress, dp_rank: int, dp_size: int
) -> Iterator[list[int]]:
    """Yield the sample numbers of a rank's micro-batches from ``progress`` to the end."""
    training, first = settings.training, progress.consumed_samples
    for _ in range(progress.step, training.train_iters):
        count = global_batch_size_at(settings, first)
        yield from micro_batch_numbers(first, count, training.micro_batch_size, dp_rank, dp_size)
        first += count


def micro_batches(
    stream: SampleStream, seq_length: int, numbers: Iterable[list[int]], num_workers: int = 0
) -> Iterator[Batch]:
    """Return the micro-batches of ``numbers``, loaded here or by ``num_workers`` processes."""
    samples = _Samples(stream, seq_length)
    if num_workers == 0:
        return map(samples.__getitem__, numbers)
    loader = DataLoader(
        samples,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        multiprocessing_context=HelperContext(),  # a fork of a process with threads can hang
        generator=torch.Generator(),  # the loader would draw a seed from the global one
    )
    with held_back():
        resource_tracker.ensure_running()  # when it starts its process it lets signals through
    with held_back():
        return iter(loader)


class _Samples(Dataset[Batch]):
    """A stream addressed by the sample numbers of one micro-batch."""

    def __init__(self, stream: SampleStream, seq_length: int) -> None:
        self._stream = stream
        self._position_ids = torch.arange(seq_length)
        self._padding: Mapping[str, np.ndarray | int] = {
            "tokens": np.zeros(seq_length, np.int64),
            "labels": np.zeros(seq_length, np.int64),
            "loss_mask": np.zeros(seq_length, np.float32),
            **dict.fromkeys(PER_SAMPLE, 0),
        }

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        rows = [self._padding if n == PADDING else self._stream[n] for n in numbers]
        batch = {
            name: torch.from_numpy(np.stack([np.asarray(row[name]) for row in rows]))
            for name in ("tokens", "labels", "loss_mask")
        }
        batch["position_ids"] = self._position_ids.expand(len(rows), -1)
        for name in PER_SAMPLE:
            batch[name] = torch.tensor([int(row[name]) for row in rows])
        return batch
