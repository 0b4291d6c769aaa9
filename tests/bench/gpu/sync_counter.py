"""Counter of calls that block the host until the device has caught up."""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

_FROM_TORCH = "called a synchronizing"
"""In torch's warning of a blocking copy, ``item()``, ``nonzero()`` or a stream's synchronize."""


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """Count blocking calls by the place in Python that made them; nothing on a CPU.

    torch's debug mode reports all but ``torch.cuda.synchronize`` and ``Event.synchronize``, which
    are wrapped. In the backward pass the place is often that of the call of ``backward``.
    """
    sites: Counter[str] = Counter()
    if not torch.cuda.is_available():
        yield sites
        return
    torch.cuda.synchronize()
    with ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        for owner, name in ((torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize")):
            counting = _counting(getattr(owner, name), sites)
            stack.enter_context(mock.patch.object(owner, name, counting))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield sites
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if _FROM_TORCH in str(warning.message):
                sites[_short(warning.filename, warning.lineno)] += 1


def _counting(function: Callable[..., Any], sites: Counter[str]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        caller = traceback.extract_stack(limit=2)[0]
        sites[_short(caller.filename, caller.lineno)] += 1
        torch.cuda.set_sync_debug_mode("default")  # it may warn too: count once
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("warn")

    return wrapped


def _short(file: str, line: int | None) -> str:
    """Return a place without the folders that all share."""
    for root in ("site-packages/", "dist-packages/", "with_te/"):
        file = file.rpartition(root)[2]
    return f"{'/'.join(file.split('/')[-4:])}:{line}"
