"""Read a tensor's bytes from inside a checkpoint's file straight to where they belong.

``torch.save`` stores a tensor as a zip archive: its description, and its elements without
compression. ``torch.load`` reads these to memory of its own, from where they would be copied.
"""

import hashlib
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
_BLOCK_BYTES = 1 << 20
"""That a call of the operating system reads: the processor's cache holds it."""
_AHEAD_BYTES = 1 << 26
"""That the disk reads while this computes."""


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
        self.start = start
        self._file, self._length, self._position = file, length, 0

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
        part = memoryview(buffer).cast("B")[: min(left, _BLOCK_BYTES)]
        count = os.preadv(self._file, [part], self.start + self._position) if len(part) else 0
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
        start = archive.tell() + sum(_LOCAL_HEADER.unpack(header))
        is_inside = start + size <= archive.seek(0, os.SEEK_END)
        return StoredTensor(dtype, shape, start) if is_inside else None
    except Exception:  # torch.load says what is wrong with it, or reads it
        return None


class OrderedFile:
    """File whose parts are read in ascending order, to memory of the caller.

    With ``summed`` each byte is read once, those between the parts too, for the file's SHA-256.
    """

    def __init__(self, file: int, summed: bool = False) -> None:
        self._file, self._position = file, 0
        self._digest = hashlib.sha256() if summed else None

    def read_into(self, offset: int, target: Tensor) -> None:
        """Fill a contiguous tensor on the CPU with the bytes from ``offset``.

        Raises:
            EOFError: the file ends before.
        """
        if self._digest is not None:
            self._skip_to(offset)
        memory = target.view(-1).view(torch.uint8).numpy().data
        self._position = offset
        end = offset + len(memory)
        while self._position < end:
            done = self._position - offset
            if not self._read(memory[done : done + _BLOCK_BYTES]):
                raise EOFError(f"the file ends at byte {self._position}")

    def sha256(self) -> str:
        """Return the sum of the whole file in hexadecimal, after its last part."""
        assert self._digest is not None
        self._skip_to(None)
        return self._digest.hexdigest()

    def _skip_to(self, offset: int | None) -> None:
        """Read up to ``offset``, or to the end."""
        assert offset is None or offset >= self._position, "parts must be read in ascending order"
        block = memoryview(bytearray(_BLOCK_BYTES))
        while offset is None or self._position < offset:
            left = _BLOCK_BYTES if offset is None else offset - self._position
            if not self._read(block[:left]):
                return

    def _read(self, memory: memoryview) -> int:
        count = os.preadv(self._file, [memory], self._position)
        if self._digest is not None:
            ahead = self._position + _AHEAD_BYTES
            os.posix_fadvise(self._file, ahead, count, os.POSIX_FADV_WILLNEED)
            self._digest.update(memory[:count])  # while the processor's cache holds it
        self._position += count
        return count
