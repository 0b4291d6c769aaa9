"""Detect truncated Zstandard files, whose end zstandard's reader accepts."""

import io
from typing import BinaryIO

MAX_HEADER_BYTES = 18
"""Maximum frame header (RFC 8878, section 3.1.1)."""
SKIPPABLE_MAGIC = 0x184D2A50
"""Magic number of skippable frames; their lowest four bits are free."""
RUN = 1
"""Type of a block of one repeated byte, which is stored once."""
CHECKSUM_BYTES = 4


def is_complete(file: BinaryIO) -> bool:
    """Return whether the file's last frame is complete; only block headers are read.

    Raises zstandard.ZstdError if there is anything but frames.
    """
    size, end = file.seek(0, io.SEEK_END), 0
    while end < size:
        frame_end = _frame_end(file, end)
        if frame_end is None:
            return False
        end = frame_end
    return end == size


def _frame_end(file: BinaryIO, start: int) -> int | None:
    """Return the end of a frame; None if the file ends within its headers."""
    import zstandard

    file.seek(start)
    header = file.read(MAX_HEADER_BYTES)
    if len(header) < 8:
        return None
    if int.from_bytes(header[:4], "little") & ~0xF == SKIPPABLE_MAGIC:
        return start + 8 + int.from_bytes(header[4:8], "little")
    place = start + zstandard.frame_header_size(header)
    last = False
    while not last:
        file.seek(place)
        block = file.read(3)
        if len(block) < 3:
            return None
        word = int.from_bytes(block, "little")
        last = bool(word & 1)
        place += 3 + (1 if word >> 1 & 3 == RUN else word >> 3)
    return place + CHECKSUM_BYTES * zstandard.get_frame_parameters(header).has_checksum
