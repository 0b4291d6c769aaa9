"""A file that could not be written is never accepted as complete."""

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from moetron.common.errors import RunError
from moetron.moe.checkpoint import tensor_writer as checkpoint_writer
from moetron.moe.checkpoint.tensor_writer import _readable, _SummingFile, _SummingFileSystem

FULL = "[Errno 28] No space left on device"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("length", [9, 100_000])  # error at the end of a file, and inside it
@pytest.mark.parametrize("failing", ["helper", "main"])
def test_an_error_of_any_thread_fails_the_save(
    failing: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files, one thread each: neither is opened before both threads have a file."""
    both = threading.Barrier(2, timeout=60)
    make = _SummingFile.__init__

    def one_is_full(self: _SummingFile, path: Path, failures: list[Exception]) -> None:
        if Path(path).suffix == ".distcp":  # not the index, written last by one thread
            both.wait()
        is_main = threading.current_thread() is threading.main_thread()
        make(self, "/dev/full" if is_main == (failing == "main") else path, failures)

    monkeypatch.setattr(_SummingFile, "__init__", one_is_full)
    files = _SummingFileSystem()
    writer = checkpoint_writer._Writer(tmp_path, files)
    tensors = {"a": torch.ones(length), "b": torch.ones(length)}
    with pytest.raises(CheckpointException) as caught:
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    assert len(files.sums) < 2
    assert not (tmp_path / ".metadata").exists()
    error = _readable(tmp_path, caught.value)
    assert isinstance(error, RunError)
    assert str(error).startswith(f"cannot write {tmp_path}: rank 0: {FULL}; ")
    assert "\n" not in str(error)


def test_a_bug_keeps_its_traceback() -> None:
    error = _readable(Path("x"), CheckpointException("", {1: (KeyError("weight"), None)}))
    assert not isinstance(error, RunError) and "RANK 1" in str(error)
