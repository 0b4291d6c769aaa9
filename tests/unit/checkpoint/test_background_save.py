"""Console lines of a save: folder, size, time; in the background also its start."""

import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch

from moetron.common.errors import RunError
from moetron.moe.checkpoint import background_save, collective_checks, save_load, tensor_writer
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.writer import writer_process
from moetron.moe.training import runtime
from tests.parallel.support.checkpoint_runs import (
    assert_identical,
    parallel_of,
    settings,
    start,
    tensors,
)

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


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_save, "RETRY_S", 0.0)


def failing_at(monkeypatch: pytest.MonkeyPatch, failures: dict[int, int]) -> None:
    """Fill the disk for the first attempts to save a step: {step: attempts}."""
    create, left = tensor_writer._SummingFileSystem.create_stream, dict(failures)

    def full(self: Any, path: Path, mode: str) -> Any:
        step = int(Path(path).parent.name[5:12])
        if ".distcp" in str(path) and left.get(step, 0) > 0:
            left[step] -= 1
            raise OSError(28, "No space left on device")
        return create(self, path, mode)

    monkeypatch.setattr(tensor_writer._SummingFileSystem, "create_stream", full)
    monkeypatch.setattr(tensor_writer, "THREADS", 1)


def run(folder: Path, background: bool, **more: Any) -> None:
    checkpoint = {"save": str(folder), "save_interval": 2, "async_save": background, **more}
    chosen = settings("dp", checkpoint=checkpoint)
    with parallel_of(chosen):
        start(chosen).run(lambda: False)


def test_the_writer_asks_no_device_about_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA, which would know pinned memory, does not work in a forked process."""

    def fail(*_: object) -> bool:
        raise RuntimeError("CUDA error: initialization error")

    monkeypatch.setattr(torch.Tensor, "is_pinned", fail)
    run(tmp_path, background=True)
    assert checkpoint_folder.step_folder(tmp_path, 4).exists()


def test_writers_that_cannot_meet_end_the_run_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gloo of a host whose name stands for 127.0.1.1; at the first save hours would be lost."""

    def fail(_: object) -> None:
        raise RuntimeError("connectFullMesh failed")

    monkeypatch.setattr(writer_process._Meeting, "join", fail)
    chosen = settings("dp", checkpoint={"save": str(tmp_path), "async_save": True})
    with (
        pytest.raises(RuntimeError, match="RuntimeError: connectFullMesh failed"),
        runtime.running(chosen),
    ):
        pytest.fail("the run has started")


@pytest.mark.parametrize(
    ("gpu", "cores", "spare"), [(True, 32, True), (True, 31, False), (False, 96, False)]
)
def test_a_writer_on_a_gpu_host_need_not_pause(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, cores: int, spare: bool
) -> None:
    """Eight ranks, whose threads are by default all cores of the host."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(writer_process, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores // 8)
    assert writer_process.has_spare_cores() is spare


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("background", [False, True])
def test_training_goes_on_after_failed_saves(
    tmp_path: Path,
    background: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two failures, a success, two failures of the last save: it ends as a healthy run does."""
    run(tmp_path / "healthy", background)
    failing_at(monkeypatch, {2: 1, 6: 2})
    run(tmp_path / "run", background)
    assert checkpoint_folder.saved_steps(tmp_path / "run") == [4, 6]
    assert caplog.text.count("WAS NOT SAVED") == 3
    assert "THE CHECKPOINT OF STEP 6 WAS NOT SAVED (failure 2 in a row" in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))
    last = checkpoint_folder.step_folder(tmp_path / "run", 6)
    checkpoint_folder.verify(last)
    healthy = checkpoint_folder.step_folder(tmp_path / "healthy", 6)
    assert_identical(tensors(last, states=True), tensors(healthy, states=True))


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("background", [False, True])
def test_too_many_failed_saves_end_the_run(
    tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at(monkeypatch, {4: 1, 6: 9})
    with pytest.raises(RunError, match=r"step_0000006.*No space left"):
        run(tmp_path, background, max_failed_saves=3)
    assert checkpoint_folder.read(tmp_path).record.progress.step == 2


@pytest.mark.parametrize("background", [False, True])
def test_space_is_checked_before_writing(
    tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collective_checks.shutil, "disk_usage", lambda path: Mock(free=1000))
    monkeypatch.setattr(tensor_writer.Contents, "write", Mock(side_effect=AssertionError))
    with pytest.raises(RunError, match=r"needs 0\.000 GB, and 0\.000 GB are free"):
        run(tmp_path, background, max_failed_saves=1)
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.usefixtures("no_pause")
def test_a_full_disk_of_other_files_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`common.pt` and `run.json` are written by rank 0 alone."""
    for name in ("write_format_files", "versions"):
        monkeypatch.setattr(save_load, name, Mock(wraps=getattr(save_load, name)))
        getattr(save_load, name).side_effect = [OSError(28, "full"), *[DEFAULT] * 9]
        run(tmp_path / name, False)
        assert checkpoint_folder.saved_steps(tmp_path / name) == [4, 6]


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
