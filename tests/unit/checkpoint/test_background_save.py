"""Console lines of a save: folder, size, time; in the background also its start."""

import re
import sys
from pathlib import Path

import pytest

from moetron.moe.checkpoint import run_folder as checkpoint_folder
from tests.parallel.support.checkpoint_runs import parallel_of, settings, start

SAVED = r"step (\d) \| saved (\S+) \(([\d.]+) MB in \d+\.\d s\)"


@pytest.mark.parametrize("background", [False, True])
def test_every_save_prints_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], background: bool
) -> None:
    checkpoint = {"save": str(tmp_path), "save_interval": 2, "async_save": background}
    chosen = settings("dp", checkpoint=checkpoint, training={"train_iters": 4})
    with parallel_of(chosen):
        start(chosen).run(lambda: False)
    lines = capsys.readouterr().out.splitlines()
    saves = [match.groups() for line in lines if (match := re.fullmatch(SAVED, line))]
    folders = [checkpoint_folder.step_folder(tmp_path, step) for step in (2, 4)]
    assert [(step, folder) for step, folder, _ in saves] == [
        (step, str(folder)) for step, folder in zip("24", folders, strict=True)
    ]
    for folder, (*_, megabytes) in zip(folders, saves, strict=True):
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert float(megabytes) == pytest.approx(size / 1e6, abs=0.051)
    begun = [line.split(" in the background")[0] for line in lines if "in the background" in line]
    assert begun == [f"step {n} | saving a checkpoint" for n in "24" if background]


def test_a_progress_bar_stays_intact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    chosen = settings("dp", checkpoint={"save": str(tmp_path)}, training={"train_iters": 1})
    with parallel_of(chosen):
        start(chosen).run(lambda: False)
    out, err = capsys.readouterr()
    assert re.fullmatch(SAVED, out.splitlines()[-1])
    assert "1/1" in err and "saved" not in err
