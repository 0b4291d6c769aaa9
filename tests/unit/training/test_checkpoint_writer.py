"""A file that could not be written is never taken for a whole one."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from moetron.moe.config.errors import RunError
from moetron.moe.training import checkpoint_writer
from moetron.moe.training.checkpoint_writer import _readable, _SummingFile, _SummingFileSystem

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("failing", ["helper", "main"])
def test_what_any_thread_meets_ends_the_save(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files, a thread each: neither begins before the other has one to write."""
    both, met = threading.Barrier(2, timeout=60), set[threading.Thread]()
    write = _SummingFile.write

    def one_fails(self: _SummingFile, data: Any) -> int:
        here = threading.current_thread()
        if here not in met:
            met.add(here)
            both.wait()
        is_main = here is threading.main_thread()
        if is_main == (failing == "main"):
            raise FULL
        return write(self, data)

    monkeypatch.setattr(_SummingFile, "write", one_fails)
    files = _SummingFileSystem()
    writer = checkpoint_writer._Writer(tmp_path, files)
    tensors = {"a": torch.ones(9), "b": torch.ones(9)}
    with pytest.raises(CheckpointException) as caught:
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    assert len(files.sums) == 1
    assert not (tmp_path / ".metadata").exists()
    said = _readable(tmp_path, caught.value)
    assert isinstance(said, RunError)
    assert str(said).startswith(f"cannot write {tmp_path}: rank 0: {FULL}; ")
    assert "\n" not in str(said)


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    said = _readable(Path("x"), CheckpointException("", {1: (KeyError("weight"), None)}))
    assert not isinstance(said, RunError) and "RANK 1" in str(said)
