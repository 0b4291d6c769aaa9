"""Read a tensor's bytes from inside a checkpoint's file straight to where they belong.

``torch.save`` stores a tensor as a zip archive: its description, and its elements without
compression. ``torch.load`` reads these to memory of its own, from where they would be copied.
"""

import io
import os
import struct
import sys
import zipfile
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from moetron.moe.checkpoint.unpickling import plain_tensor

_MAX_DESCRIPTION_BYTES = 1 << 16
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip archive's member: the lengths of its name and of its extra field, which follow."""
_MAX_READ_BYTES = 1 << 30
"""One call of the operating system reads less than 2 GiB."""


class StoredTensor(NamedTuple):
    """A contiguous tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the archive."""

    def new(self) -> Tensor:
        """Return memory for it."""
        return torch.empty(self.shape, dtype=self.dtype)

    def fits(self, target: Tensor) -> bool:
        """Return whether ``target`` can take its bytes as they are."""
        alike = target.dtype == self.dtype and tuple(target.shape) == self.shape
        plain = type(target) in (Tensor, torch.nn.Parameter) and target.device.type == "cpu"
        return alike and plain and target.is_contiguous()


class FilePart(io.RawIOBase):
    """The bytes ``[start, start + length)`` of an open file, with a position of its own."""

    def __init__(self, file: int, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to ``offset`` from the start, the position or the end."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}
        self._position = max(0, origin[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to the length of ``buffer``; return the bytes read, 0 at the end."""
        left = max(0, self._length - self._position)
        part = memoryview(buffer).cast("B")[: min(left, _MAX_READ_BYTES)]
        count = os.preadv(self._file, [part], self._start + self._position) if len(part) else 0
        self._position += count
        return count


def find_tensor(archive: IO[bytes]) -> StoredTensor | None:
    """Find the tensor of an archive by ``torch.save``; None if it is stored in another way."""
    try:
        with zipfile.ZipFile(archive) as members:
            files = {info.filename.rpartition("archive/")[2]: info for info in members.infolist()}
            if files["data.pkl"].file_size > _MAX_DESCRIPTION_BYTES:
                return None
            name, shape = plain_tensor(members.read(files["data.pkl"]))
            order = members.read(files["byteorder"]) if "byteorder" in files else b""
        data, dtype = files["data/0"], getattr(torch, name)
        size = torch.Size(shape).numel() * dtype.itemsize
        if data.compress_type != zipfile.ZIP_STORED or data.file_size != size:
            return None
        if order != sys.byteorder.encode():
            return None
        archive.seek(data.header_offset)
        header = archive.read(_LOCAL_HEADER.size)
        return StoredTensor(dtype, shape, archive.tell() + sum(_LOCAL_HEADER.unpack(header)))
    except Exception:  # torch.load says what is wrong with it, or reads it
        return None


def read_into(file: int, offset: int, target: Tensor) -> None:
    """Fill a contiguous tensor on the CPU with a file's bytes from ``offset``.

    Raises:
        EOFError: the file ends before.
    """
    memory = target.view(-1).view(torch.uint8).numpy().data
    part, done = FilePart(file, offset, len(memory)), 0
    while done < len(memory):
        count = part.readinto(memory[done:])
        if not count:
            raise EOFError(f"the file ends at byte {offset + done}")
        done += count
