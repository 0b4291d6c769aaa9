"""Memory for copies of tensors that a rank shares with its writer process."""

import mmap
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Stored:
    """Place of a copied tensor, contiguous, from ``offset`` (bytes) on."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class SharedMemory:
    """Bytes of an anonymous file: in memory on Linux, elsewhere on disk.

    Not in /dev/shm, which is small in containers.

    Args:
        descriptor: of the other process's memory; None creates one.
    """

    def __init__(self, size_bytes: int, descriptor: int | None = None) -> None:
        self.size_bytes = size_bytes
        self.descriptor = _anonymous_file(size_bytes) if descriptor is None else descriptor
        self._end = 0
        pages = mmap.mmap(self.descriptor, max(1, size_bytes))
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8)

    def clear(self) -> None:
        """Begin to store from the start."""
        self._end = 0

    def store(self, tensor: torch.Tensor) -> Stored:
        """Copy a tensor of any device behind the last one."""
        place = Stored(self._end, tensor.shape, tensor.dtype)
        self._end += _padded(tensor.nbytes)
        self.tensor(place).copy_(tensor.detach())
        return place

    def tensor(self, place: Stored) -> torch.Tensor:
        """Return the tensor at a place; it shares this memory."""
        size = place.shape.numel() * place.dtype.itemsize
        return self._bytes[place.offset : place.offset + size].view(place.dtype).view(place.shape)


def needed_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the size of the memory that holds copies of these tensors."""
    return sum(_padded(tensor.nbytes) for tensor in tensors)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _anonymous_file(size_bytes: int) -> int:
    if sys.platform == "linux":
        descriptor = os.memfd_create("checkpoint")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, max(1, size_bytes))
    return descriptor
