"""The nearest valid name for a mistyped one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """``; did you mean X?`` for the valid name that is most like ``name``, or the empty string."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""
