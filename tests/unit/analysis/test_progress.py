"""Progress lines without a terminal, and the checkpoint that they name."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moetron.common import progress
from moetron.common.progress import report_batches
from moetron.moe.analysis import routing_study as study
from moetron.moe.analysis.routing_trace import Windows


def test_lines_are_printed_at_intervals_and_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def batches() -> Iterator[str]:
        nonlocal now
        for batch in "abcde":
            now += 4
            yield batch

    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    assert list(report_batches(batches(), 5, "model")) == list("abcde")
    assert capsys.readouterr().err.splitlines() == [
        "model: 3 of 5 batches, 8 s left",
        "model: 5 of 5 batches, 0 s left",
    ]


def test_every_checkpoint_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    tokens_BS = np.zeros((3, study.TOKENS_AT_ONCE), dtype=np.int64)
    text = study.Text([Windows("code", tokens_BS, tokens_BS)], str)
    seen: list[Any] = list(text.batches("checkpoint of step 7"))
    assert len(seen) == 3
    assert "checkpoint of step 7: 3 of 3 batches" in capsys.readouterr().err
