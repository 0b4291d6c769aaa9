"""Sample numbers of a rank's micro-batches, and their tensors.

Inside a global batch of samples ``first, first + 1, ...`` micro-batch m of data-parallel rank r
holds samples ``first + m * mbs * dp + r * mbs + [0, mbs)``, so that every layout forms the same
micro-batches. Every rank reads its own samples: nothing is broadcast, and a resume needs only the
number of consumed samples. Shape suffixes: B samples of a micro-batch, S full sequence.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moetron.common.errors import RunError
from moetron.common.parent_death import HelperContext
from moetron.common.stop_signal import held_back
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.schema.derived import global_batch_size_at
from moetron.moe.config.schema.settings import Settings
from moetron.moe.training.sample_stream import SampleStream

Batch = dict[str, torch.Tensor]
"""tokens, labels: int64 [b, S]; loss_mask: float32 [b, S]; PER_SAMPLE: int64 [b].

Samples with ``documents`` add cu_seqlens: int32 [D + 1], the ends of all documents in the flattened
rows, from 0 (moe/layers/document_attention.py); samples with ``padding`` add padding: int64 [b];
samples of an encoder-decoder add segments: int64 [b, S].
Preferences add `BY_CONVERSATION`, and conversation: int64 [b, S], each position's number in its
sample; single answers (KTO) also the fields of their `mismatched` samples.
"""

BY_CONVERSATION = ("numbers", "reference", "wanted", "examples")
"""Fields of preferences that are not by position: number of each conversation (-1 behind the last
one), its log-probability under the reference, and whether a single answer is wanted, [b, S]; pairs
or single answers of each sample, int64 [b]."""

PER_SAMPLE = ("source", "objective", "prefix", "filtered")
"""Fields with one value per sample."""

WEIGHTS = ("loss_weight", "loss_count")
"""Optional fields, float32 [b, S]: weights of losses, and what their sum is divided by the sum of;
``loss_mask`` for both if absent."""

_MISMATCHED = "mismatched."
"""In front of the names of fields of mismatched samples."""

_Arrays = dict[str, np.ndarray]
"""A batch in NumPy."""

_CPU = torch.device("cpu")

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
    stream: SampleStream,
    seq_length: int,
    numbers: Iterable[list[int]],
    num_workers: int = 0,
    device: torch.device = _CPU,
) -> Iterator[Batch]:
    """Return the micro-batches of ``numbers`` on ``device``.

    They are loaded here or by ``num_workers`` processes, for a GPU one ahead.
    """
    loaded = _loaded(_Samples(stream, seq_length), numbers, num_workers)
    return sent_ahead(loaded, device) if device.type == "cuda" else loaded


def _loaded(samples: "_Samples", numbers: Iterable[list[int]], num_workers: int) -> Iterator[Batch]:
    if num_workers == 0:
        return map(_tensors, map(samples.__getitem__, numbers))
    loader = DataLoader(
        samples,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        multiprocessing_context=HelperContext(),  # a fork of a process with threads can hang
        generator=torch.Generator(),  # the loader would draw a seed from the global one
        collate_fn=_as_it_is,
    )
    with held_back():
        resource_tracker.ensure_running()  # when it starts its process it lets signals through
    with held_back():
        return map(_tensors, iter(loader))


def _as_it_is(arrays: Any) -> Any:
    """Keep NumPy's arrays: they come through a pipe; tensors use /dev/shm, which may be full."""
    return arrays


def _tensors(arrays: _Arrays) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


LOST_WORKER = "DataLoader worker"
"""In torch's errors about a worker that ended."""


@contextmanager
def lost_workers() -> Iterator[None]:
    """Name a loader worker that ended; torch raises wherever the main thread is at that moment."""
    try:
        yield
    except RuntimeError as error:
        if LOST_WORKER not in str(error):
            raise
        raise RunError(
            f"a process that loads samples ended ({' '.join(str(error).split())}) by hand, or for "
            "lack of memory: resume, with fewer --num-workers if it comes back"
        ) from None


def sent_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield ``batches`` on a GPU; the next one travels while the current one is used.

    One copy from pinned memory on a stream of its own: a copy from pageable memory would block the
    host until the device has finished all earlier work.
    """
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        sent = _send(batch, device, stream)
        if ahead is not None:
            yield _received(*ahead)
        ahead = sent
    if ahead is not None:
        yield _received(*ahead)


def _send(
    batch: Batch, device: torch.device, stream: torch.cuda.Stream
) -> tuple[Batch, torch.Tensor, torch.cuda.Event]:
    """Start the copy of a micro-batch; return it, its memory and the event of its arrival."""
    # torch keeps pinned memory for reuse, and does not reuse it before its copies have ended.
    pinned = torch.empty(packed_bytes(batch), dtype=torch.uint8, pin_memory=True)
    for name, field in fields_of(pinned, batch).items():
        field.copy_(batch[name])
    with torch.cuda.stream(stream):
        memory = pinned.to(device, non_blocking=True)
        arrival = stream.record_event()
    return fields_of(memory, batch), memory, arrival


def _received(batch: Batch, memory: torch.Tensor, arrival: torch.cuda.Event) -> Batch:
    """Let the current stream wait for a micro-batch, not the host; return the micro-batch."""
    current = torch.cuda.current_stream()
    current.wait_event(arrival)
    memory.record_stream(current)  # which uses memory that belongs to the copy stream
    return batch


def mismatched(batch: Batch) -> Batch:
    """Return the mismatched samples of a micro-batch: its prompts with the answers to others."""
    return {
        name.removeprefix(_MISMATCHED): field
        for name, field in batch.items()
        if name.startswith(_MISMATCHED)
    }


def matched(batch: Batch) -> Batch:
    """Return a micro-batch without its mismatched samples."""
    return {name: field for name, field in batch.items() if not name.startswith(_MISMATCHED)}


class Replay(Iterator[Batch]):
    """Micro-batches of which those since the last `forget` can be read again."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._kept: list[Batch] = []
        self._place = 0

    def __next__(self) -> Batch:
        """Return the next micro-batch, a kept one after `rewind`."""
        if self._place == len(self._kept):
            self._kept.append(next(self._batches))
        self._place += 1
        return self._kept[self._place - 1]

    def forget(self) -> None:
        """Keep none of the micro-batches so far."""
        self._kept, self._place = [], 0

    def rewind(self) -> None:
        """Return to the last `forget`."""
        self._place = 0


def packed_bytes(batch: Batch) -> int:
    """Return the size of a buffer for all fields."""
    return sum(field.numel() * field.itemsize for field in batch.values())


def fields_of(buffer: torch.Tensor, batch: Batch) -> Batch:
    """Return fields like those of ``batch`` as parts of ``buffer`` (uint8), widest types first."""
    fields, start = {}, 0
    for name, like in sorted(batch.items(), key=lambda item: -item[1].itemsize):
        size = like.numel() * like.itemsize
        fields[name] = buffer[start : start + size].view(like.dtype).view(like.shape)
        start += size
    return fields


class _Samples(Dataset[_Arrays]):
    """A stream addressed by the sample numbers of one micro-batch."""

    def __init__(self, stream: SampleStream, seq_length: int) -> None:
        self._stream = stream
        self._padding: Mapping[str, np.ndarray | int] = {
            "tokens": np.zeros(seq_length, np.int64),
            "labels": np.zeros(seq_length, np.int64),
            "loss_mask": np.zeros(seq_length, np.float32),
            **dict.fromkeys(PER_SAMPLE, 0),
        }

        self._no_preferences = {
            "conversation": np.zeros(seq_length, np.int64),
            "numbers": np.full(seq_length, -1),
            "reference": np.zeros(seq_length, np.float32),
            "wanted": np.zeros(seq_length, np.int64),
            "examples": np.int64(0),
        }

    def __getitem__(self, numbers: Sequence[int]) -> _Arrays:
        rows = [self._padding if n == PADDING else self._stream[n] for n in numbers]
        like = next((row for row in rows if row is not self._padding), None) or self._stream[0]
        batch = self._stacked(rows, like)
        if isinstance(like.get("mismatched"), Mapping):
            others = [row.get("mismatched", self._padding) for row in rows]
            found = self._stacked(others, like["mismatched"])  # type: ignore[arg-type]
            batch |= {_MISMATCHED + name: field for name, field in found.items()}
        return batch

    def _stacked(self, rows: Sequence[Any], like: Mapping[str, Any]) -> _Arrays:
        """Return the fields of samples like ``like``; some of them, or all, may be padding."""
        names = set(like).union(*rows)
        batch = {
            name: np.stack([np.asarray(row[name]) for row in rows])
            for name in ("tokens", "labels", "loss_mask")
        }
        if "segments" in names:
            ones = np.ones(len(batch["tokens"][0]), np.int64)  # padding rows attend to themselves
            batch["segments"] = np.stack([np.asarray(row.get("segments", ones)) for row in rows])
        for name in WEIGHTS:
            if name in names:
                none = self._padding["loss_mask"]
                batch[name] = np.stack([np.asarray(row.get(name, none)) for row in rows])
        for name in PER_SAMPLE:
            batch[name] = np.array([int(row[name]) for row in rows])
        for name, nothing in self._no_preferences.items():
            if name in names:
                batch[name] = np.stack([np.asarray(row.get(name, nothing)) for row in rows])
        if any("padding" in row for row in rows):
            batch["padding"] = np.array([int(row.get("padding", 0)) for row in rows])
        if any("documents" in row for row in rows):
            whole = [len(self._padding["tokens"])]  # type: ignore[arg-type]
            lengths = [np.asarray(row.get("documents", whole)) for row in rows]
            batch["cu_seqlens"] = document_ends(np.concatenate(lengths))
        return batch


def document_ends(lengths: np.ndarray) -> np.ndarray:
    """Return ``cu_seqlens`` of documents of these lengths: int32 [2^n + 1], the last end repeated.

    Kernels are planned or captured by shape: powers of two are few.
    """
    ends = np.cumsum(lengths, dtype=np.int32)
    size = 1 << (len(ends) - 1).bit_length()
    return np.concatenate([[0], ends, np.full(size - len(ends), ends[-1])]).astype(np.int32)
