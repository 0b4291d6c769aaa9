"""Comparison of two runs of a step, and its file."""

import math
from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.moe.health.rerun import FILE, RerunRecord, _read, difference

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([2.0, 5.0], [2.0, 5.0], 0.0),
        ([2.0, 5.0], [2.0, 4.0], 0.2),
        ([NAN, INF], [NAN, INF], 0.0),
        ([NAN, 1.0], [2.0, 1.0], INF),
        ([INF], [-INF], INF),
        ([0.0], [0.0], 0.0),
        ([0.0], [1e-9], 1.0),
    ],
)
def test_difference(first: list[float], second: list[float], expected: float) -> None:
    assert difference(first, second) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"step": 1.5, "ranks": []}', '{"step": 1, "ranks": [{"node": 3}]}', "[" * 100_000],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=f"{FILE}: damaged"):
        _read(tmp_path / FILE)


def test_files_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(RerunRecord(step=1, ranks=[]).model_dump_json())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).symlink_to("../elsewhere")
    with pytest.raises(UserError, match="leads out of the folder"):
        _read(tmp_path / "run" / FILE)
    assert _read(tmp_path / FILE) is None
