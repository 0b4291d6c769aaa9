"""Progress lines without a terminal, and the checkpoint that they name."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetron.commands.analyze_routing import parser, require_place
from moetron.common import progress
from moetron.common.errors import UserError
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


def test_results_without_a_place_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = parser().parse_args([str(tmp_path)])
    require_place(given)
    assert list(tmp_path.iterdir()) == []  # nothing is made for a model that may be refused
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot write there; give another folder with --output"):
        require_place(given)
    (tmp_path / "analysis").touch()
    with pytest.raises(UserError, match=r"--output .*analysis: cannot write there"):
        require_place(given)


def test_every_checkpoint_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    tokens_BS = np.zeros((3, study.TOKENS_AT_ONCE), dtype=np.int64)
    text = study.Text([Windows("code", tokens_BS, tokens_BS)], str)
    seen: list[Any] = list(text.batches("checkpoint of step 7"))
    assert len(seen) == 3
    assert "checkpoint of step 7: 3 of 3 batches" in capsys.readouterr().err
