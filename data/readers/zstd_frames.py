"""Whether a Zstandard file is whole: zstandard's reader takes a broken end for the end."""

import io
from typing import BinaryIO

MAX_HEADER_BYTES = 18
"""Of a frame (RFC 8878, section 3.1.1)."""
SKIPPABLE_MAGIC = 0x184D2A50
"""Of frames to pass over; their lowest four bits are free."""
RUN = 1
"""Type of a block of one repeated byte, which alone is there."""
CHECKSUM_BYTES = 4


def ends_whole(file: BinaryIO) -> bool:
    """Whether the last of the file's frames is there in full; only headers of blocks are read.

    Raises zstandard.ZstdError if there is something else than frames.
    """
    size, end = file.seek(0, io.SEEK_END), 0
    while end < size:
        frame_end = _frame_end(file, end)
        if frame_end is None:
            return False
        end = frame_end
    return end == size


def _frame_end(file: BinaryIO, start: int) -> int | None:
    """Where a frame ends; None if the file ends within its headers."""
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
