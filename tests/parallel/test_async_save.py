"""A background save equals a blocking one and is atomic."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from moetron.common.errors import UserError
from moetron.moe.checkpoint import (
    run_folder as checkpoint_folder,
)
from moetron.moe.checkpoint import (
    tensor_writer as checkpoint_writer,
)
from moetron.moe.checkpoint.tensor_writer import Contents
from tests.parallel.support.checkpoint_runs import (
    metrics,
    parallel_of,
    run,
    settings,
    start,
    tensors,
)
from tests.parallel.support.harness import RankFailed, run_ranks

SLOW_S = 0.5


def _slow_writes() -> None:
    """Delay a save so that several steps change every tensor meanwhile."""
    write = Contents.write

    def slow(*args: object) -> dict[str, str]:
        time.sleep(SLOW_S)
        return write(*args)

    Contents.write = slow


def _run(folder: str, layout: str, background: bool) -> None:
    if background:
        _slow_writes()
    checkpoint = {"save": folder, "save_interval": 2, "async_save": background}
    precision = {"bf16": layout == "dp"}
    run(settings(layout, checkpoint=checkpoint, precision=precision))


@pytest.mark.parametrize(("layout", "ranks"), [("dp", 1), ("ep2_zero", 2)])
def test_a_background_save_equals_a_blocking_one(tmp_path: Path, layout: str, ranks: int) -> None:
    folders = {background: tmp_path / str(background) for background in (False, True)}
    for background, folder in folders.items():
        run_ranks(_run, ranks, str(folder), layout, background)
    assert metrics(folders[True]) == metrics(folders[False])
    assert checkpoint_folder.saved_steps(folders[True]) == [2, 4, 6]
    for step in (2, 4, 6):
        one, other = (checkpoint_folder.step_folder(folder, step) for folder in folders.values())
        checkpoint_folder.verify(other)
        names = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
        assert names[0] == names[1]
        ours, theirs = tensors(one), tensors(other)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key


def _latest_while_writing(folder: str) -> list[object]:
    """Return (step, `latest`, whether the next checkpoint is complete) after each step."""
    _slow_writes()
    seen: list[object] = []
    run_folder = Path(folder)
    checkpoint = {"save": folder, "save_interval": 3, "async_save": True}
    chosen = settings("ep2", checkpoint=checkpoint)
    with parallel_of(chosen):
        loop = start(chosen)

        def look() -> bool:
            done = checkpoint_folder.saved_steps(run_folder)
            seen.append([loop.progress.step, checkpoint_folder.latest_step(run_folder), done])
            return False

        loop.run(look)
    return seen


def test_latest_moves_when_all_ranks_have_written(tmp_path: Path) -> None:
    """The step after a save sees no complete checkpoint; the next save and the end wait for it."""
    seen, _ = run_ranks(_latest_while_writing, 2, str(tmp_path))
    assert seen[3] == [3, None, []]
    assert checkpoint_folder.saved_steps(tmp_path) == [3, 6]
    assert checkpoint_folder.read(tmp_path).record.progress.step == 6
    assert not list(tmp_path.glob("*.tmp"))


def _fail_on_one_rank(folder: str) -> None:
    """Run with a full disk on rank 1 at the second save."""
    create = checkpoint_writer._SummingFileSystem.create_stream
    rank = torch.distributed.get_rank()

    def full(self: object, path: Path, mode: str) -> object:
        if rank == 1 and "step_0000004" in str(path):
            raise OSError(28, "No space left on device")
        return create(self, path, mode)

    checkpoint_writer._SummingFileSystem.create_stream = full
    checkpoint = {"save": folder, "save_interval": 2, "async_save": True}
    chosen = settings("ep2", checkpoint={**checkpoint, "max_failed_saves": 1})
    with parallel_of(chosen):
        with pytest.raises(RuntimeError, match="cannot write") as error:
            start(chosen).run(lambda: False)
        assert "No space left" in str(error.value)
    tolerant = settings("ep2", checkpoint={**checkpoint, "save": f"{folder}/tolerant"})
    with parallel_of(tolerant):
        start(tolerant).run(lambda: False)


def test_a_failure_on_one_rank_reaches_all_and_keeps_the_previous_checkpoint(
    tmp_path: Path,
) -> None:
    run_ranks(_fail_on_one_rank, 2, str(tmp_path))
    assert checkpoint_folder.read(tmp_path).record.progress.step == 2
    assert checkpoint_folder.saved_steps(tmp_path) == [2]
    assert checkpoint_folder.saved_steps(tmp_path / "tolerant") == [2, 6]


def _fail_while_writing(folder: str) -> None:
    """Fail in training while a checkpoint is being written."""
    _slow_writes()
    checkpoint = {"save": folder, "save_interval": 2, "async_save": True}
    chosen = settings("ep2", checkpoint=checkpoint)
    with parallel_of(chosen):
        loop = start(chosen)

        def fail() -> bool:
            if loop.progress.step == 2:
                raise UserError("enough")
            return False

        loop.run(fail)


def test_a_failed_run_completes_the_checkpoint_in_progress(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="enough"):
        run_ranks(_fail_while_writing, 2, str(tmp_path))
    assert checkpoint_folder.read(tmp_path).record.progress.step == 2


def _lose_the_writer(folder: str) -> None:
    """Kill the writer of rank 1 after the first save."""
    checkpoint = {"save": folder, "save_interval": 2, "async_save": True}
    chosen = settings("ep2", checkpoint=checkpoint)
    with parallel_of(chosen):
        loop = start(chosen)

        def kill() -> bool:
            if loop.progress.step == 3 and torch.distributed.get_rank() == 1:
                loop._saver.wait()
                (writer,) = multiprocessing.active_children()
                writer.kill()
                writer.join()
            return False

        loop.run(kill)


def test_a_lost_writer_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"checkpoints of rank 1 ended|connection|closed"):
        run_ranks(_lose_the_writer, 2, str(tmp_path))
    assert checkpoint_folder.read(tmp_path).record.progress.step == 2
