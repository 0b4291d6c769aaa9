"""Memory of a rank: its peak, reuse of freed memory on the CPU, and Python's garbage."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory; return whether it can (glibc).

    glibc returns a large tensor's pages to the kernel when it is freed, so every step pays for
    zeroed pages again. Here large tensors come from the heap, which never shrinks: see M_MMAP_MAX
    and M_TRIM_THRESHOLD in mallopt(3). The peak does not change; memory freed between peaks is not
    available to other programs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank since its start.

    On a GPU: the peak of torch's allocator (``max_memory_allocated``). On a CPU: the peak resident
    set of this process, without data workers.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux: getrusage(2) may report the peak of the launcher that forked this process
        status = _STATUS.read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


class GarbageCollector:
    """Collector of Python's garbage after given steps; see --manual-gc.

    The automatic one starts whenever many objects were made, at another moment on every rank, and
    every rank then waits for the one that collects. Objects made before the first step stay out of
    later collections.

    Args:
        manual: whether to turn the automatic one off, until `close`.
        interval: steps between collections; 0: none.
    """

    def __init__(self, manual: bool, interval: int) -> None:
        self._manual, self._interval = manual, interval
        if manual:
            gc.disable()
            gc.collect()
            gc.freeze()

    def after_step(self, step: int) -> None:
        """Collect if ``step`` is due."""
        if self._manual and self._interval and step % self._interval == 0:
            gc.collect()

    def close(self) -> None:
        """Turn the automatic one on again."""
        if self._manual:
            gc.unfreeze()
            gc.enable()
