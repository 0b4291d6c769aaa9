"""Samples of a rank: worked examples, and equal micro-batches in every layout."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetron.moe.checkpoint.position import Progress
from moetron.moe.training import batches
from moetron.moe.training.batches import (
    PADDING,
    Batch,
    fields_of,
    micro_batch_numbers,
    micro_batches,
    packed_bytes,
    training_numbers,
)
from moetron.moe.training.sample_stream import StreamFrom
from tests.unit.training.training_cases import CountingStream, settings


def test_worked_example() -> None:
    """Samples 100 to 111, micro-batches of two, three ranks."""
    ranks = [list(micro_batch_numbers(100, 12, 2, rank, 3)) for rank in range(3)]
    assert ranks == [
        [[100, 101], [106, 107]],
        [[102, 103], [108, 109]],
        [[104, 105], [110, 111]],
    ]


def test_surplus_rows_are_padding() -> None:
    ranks = [list(micro_batch_numbers(0, 5, 2, rank, 2, padded_count=8)) for rank in range(2)]
    assert ranks == [[[0, 1], [4, PADDING]], [[2, 3], [PADDING, PADDING]]]


@given(
    micro=st.integers(1, 4),
    sizes=st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]),
    first=st.integers(0, 10**12),
)
def test_layouts_form_the_same_micro_batches(
    micro: int, sizes: tuple[int, int], first: int
) -> None:
    dp_size, rounds = sizes
    ranks = [
        list(micro_batch_numbers(first, micro * 6, micro, rank, dp_size)) for rank in range(dp_size)
    ]
    in_order = [ranks[rank][turn] for turn in range(rounds) for rank in range(dp_size)]
    assert in_order == list(micro_batch_numbers(first, micro * 6, micro, 0, 1))


def test_a_resume_continues_with_the_next_sample() -> None:
    """A ramp from 4 by 2 to 8 over 20 samples: steps of 4, 4, 4, 6, 6 and then 8 samples."""
    run = settings(training={"train_iters": 7, "rampup_batch_size": (4, 2, 20)})
    all_numbers = [n for numbers in training_numbers(run, Progress(), 0, 1) for n in numbers]
    assert all_numbers == list(range(4 + 4 + 4 + 6 + 6 + 8 + 8))
    rest = [n for numbers in training_numbers(run, Progress(3, 12, 48), 0, 1) for n in numbers]
    assert rest == all_numbers[12:]


def test_tensors_of_a_micro_batch() -> None:
    (batch,) = micro_batches(CountingStream(), 4, [[7, PADDING]])
    assert batch["tokens"].tolist() == [[7] * 4, [0] * 4]
    assert batch["labels"].tolist() == [[8] * 4, [0] * 4]
    assert batch["loss_mask"].tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert batch["source"].tolist() == [1, 0]
    assert batch["tokens"].dtype == torch.int64
    assert batch["loss_mask"].dtype == torch.float32


def test_loader_processes_do_not_change_batches() -> None:
    """Nor their order, nor the global random state."""
    numbers = [[n, n + 1] for n in range(0, 20, 2)]
    here = list(micro_batches(CountingStream(), 4, numbers))
    state = torch.get_rng_state()
    there = list(micro_batches(CountingStream(), 4, numbers, num_workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(there) == len(here)
    for ours, theirs in zip(here, there, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_stream_from_a_later_number() -> None:
    later = StreamFrom(CountingStream(length=10), 6)
    assert len(later) == 4
    assert later[1]["tokens"].tolist() == [7] * 4  # type: ignore[union-attr]
    assert later.state() == {"counting": 10, "first": 6}


def test_fields_share_one_buffer() -> None:
    """What a GPU gets in one copy, unpacked, is the micro-batch."""
    (batch,) = micro_batches(CountingStream(), 4, [[7, 8, PADDING]])
    buffer = torch.empty(packed_bytes(batch), dtype=torch.uint8)
    for name, field in fields_of(buffer, batch).items():
        field.copy_(batch[name])
    arrived = fields_of(buffer.clone(), batch)
    assert arrived.keys() == batch.keys()
    for name, field in arrived.items():
        assert torch.equal(field, batch[name]) and field.dtype == batch[name].dtype


def test_a_gpu_gets_every_micro_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for streams and pinned memory; the copy of the next one starts first."""
    order: list[str] = []

    def send(batch: Batch, *_: Any) -> tuple[Batch, torch.Tensor, Any]:
        order.append(f"send {int(batch['tokens'][0, 0])}")
        return batch, torch.empty(0), None

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(batches, "_send", send)
    monkeypatch.setattr(batches, "_received", lambda batch, *_: batch)
    loaded = micro_batches(CountingStream(), 4, [[1], [2], [3]], device=torch.device("cuda"))
    for batch in loaded:
        order.append(f"use {int(batch['tokens'][0, 0])}")
    assert order == ["send 1", "send 2", "use 1", "send 3", "use 2", "use 3"]


SIGNALLED = """
import os, signal
from moetron.common.stop_signal import STOP_SIGNALS
from moetron.data.stream.mock_stream import MockStream
from moetron.moe.training.batches import micro_batches

if __name__ == "__main__":
    came = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: came.append(number))
    batches = micro_batches(MockStream(1, 96, 16), 16, iter([[n] for n in range(50)]), 1)
    for number in STOP_SIGNALS:  # while the worker starts
        os.killpg(0, number)
    next(batches)
    for number in STOP_SIGNALS:
        os.killpg(0, number)
    print(1 + sum(1 for _ in batches), len(came))
"""


def test_signals_to_the_group_of_a_rank_do_not_reach_its_workers(tmp_path: Path) -> None:
    """Terminals and torchrun signal the whole process group."""
    program = tmp_path / "signalled.py"
    program.write_text(SIGNALLED)
    command = [sys.executable, str(program)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        out, errors = process.communicate(timeout=100)
    assert (process.returncode, out) == (0, "50 6\n"), errors


class _PreferenceStream(CountingStream):
    """Samples with an example and its mismatched one."""

    def __getitem__(self, n: int) -> dict[str, Any]:
        sample = dict(super().__getitem__(n))
        numbers = np.full(len(sample["tokens"]), -1)
        numbers[0] = n
        mine = {**sample, "numbers": numbers, "examples": 1}
        return {**mine, "mismatched": {**mine, "tokens": sample["tokens"] + 100}}


@pytest.mark.parametrize("numbers", [[3, PADDING], [PADDING, PADDING]])
def test_padding_has_no_examples(numbers: list[int]) -> None:
    """Also a micro-batch of nothing but padding has the fields that losses read."""
    stream = _PreferenceStream()
    (batch,) = micro_batches(stream, len(stream[0]["tokens"]), [numbers])
    real = [int(n != PADDING) for n in numbers]
    for part in (batches.matched(batch), batches.mismatched(batch)):
        assert part["examples"].tolist() == real
        assert (part["numbers"] >= 0).sum(1).tolist() == real
    assert not set(batches.matched(batch)) - set(batches.mismatched(batch))
    if real[0]:
        ours, others = batches.matched(batch)["tokens"], batches.mismatched(batch)["tokens"]
        assert (others[0] - ours[0] == 100).all()
