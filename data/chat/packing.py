"""Packing of conversations into rows without cutting any: best-fit decreasing.

The longest come first; each goes to the row with the least room that still holds it, else to a new
row. At most 11/9 of the fewest rows + 1; on lengths of real chats nearly none is lost. Examples of
an encoder-decoder have two lengths: `pack_stacks`.
"""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], room: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Return the numbers of the conversations in each row.

    Args:
        lengths: of all conversations, from 1 to ``room``.
        room: tokens of a row.
        order: all numbers; conversations of equal length are taken in this order, so that the
            number of rows does not depend on it. Unset: as numbered.
    """
    taken = np.arange(len(lengths)) if order is None else np.asarray(order)
    sizes = np.asarray(lengths)[taken]
    longest_first = taken[np.argsort(-sizes, kind="stable")]
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows by their free tokens
    free = _Free(room)
    for number in longest_first.tolist():
        size = int(lengths[number])
        left = free.at_least(size)
        if left is None:
            row, left = len(rows), room
            rows.append([])
        else:
            row = with_room[left].pop()
            if not with_room[left]:
                free.remove(left)
        rows[row].append(number)
        left -= size
        if left:
            with_room[left].append(row)
            free.add(left)
    return rows


OPEN_ROWS = 1024
"""Rows that `pack_stacks` still fills; the oldest is closed, so that a search stays short."""


def pack_stacks(
    lengths: np.ndarray, room: tuple[int, int], order: Sequence[int]
) -> list[list[int]]:
    """Return the examples in each row of an encoder and a decoder: first-fit decreasing.

    Args:
        lengths: tokens of each example in both, int [n, 2], at most those of ``room``.
        room: tokens of a row in both.
        order: as in `pack`, for examples that are equal in both lengths.
    """
    taken = np.asarray(order)
    sizes = lengths[taken]
    share = (sizes / np.array(room)).max(1)  # the stack that an example fills more decides
    longest_first = np.lexsort((-sizes[:, 1], -sizes[:, 0], -share))  # stable
    rows: list[list[int]] = []
    left = np.zeros((OPEN_ROWS, 2), np.int64)  # of row r in slot r % OPEN_ROWS
    for place in longest_first.tolist():
        fits = (left >= sizes[place]).all(1)
        slot = int(fits.argmax())
        if fits[slot]:
            row = len(rows) - 1 - (len(rows) - 1 - slot) % OPEN_ROWS  # the newest in this slot
        else:
            row, slot = len(rows), len(rows) % OPEN_ROWS
            rows.append([])
            left[slot] = room
        rows[row].append(int(taken[place]))
        left[slot] -= sizes[place]
    return rows


class _Free:
    """Set of numbers up to a limit, with the smallest one from some number on.

    Bits of one integer: a few machine words for a row of thousands of tokens.
    """

    def __init__(self, limit: int) -> None:
        self._bits = 0
        self._limit = limit

    def add(self, number: int) -> None:
        self._bits |= 1 << number

    def remove(self, number: int) -> None:
        self._bits &= ~(1 << number)

    def at_least(self, number: int) -> int | None:
        rest = self._bits >> number
        return number + (rest & -rest).bit_length() - 1 if rest else None
