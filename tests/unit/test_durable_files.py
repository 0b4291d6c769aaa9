"""Durable names on file systems that cannot sync a folder."""

import errno
import os
import stat
from pathlib import Path

import pytest

from moetron.common.files import write_text


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_takes_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    """SMB answers EINVAL; an error of the disk counts."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if fails:
        with pytest.raises(OSError, match="Input/output"):
            write_text(tmp_path / "latest", "a")
    else:
        write_text(tmp_path / "latest", "a")
        assert (tmp_path / "latest").read_text() == "a"
