"""Values and tables as text."""

from collections.abc import Sequence
from typing import Any


def value_text(value: Any, unset: str = "unset") -> str:
    """Return a setting's value as its flag takes it; ``unset`` for None."""
    if isinstance(value, list | tuple):
        return " ".join(value_text(item, unset) for item in value)
    if value is None:
        return unset
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns, the first aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )
