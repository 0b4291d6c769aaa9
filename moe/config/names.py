"""The nearest valid name for a mistyped one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """``; did you mean X?`` for the valid name that is most like ``name``, or the empty string."""
    bare = {word.lstrip("-"): word for word in valid}  # "--" would make short flags alike
    found = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.6)
    return f"; did you mean {bare[found[0]]}?" if found else ""
