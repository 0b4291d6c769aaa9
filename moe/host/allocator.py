"""Memory of a rank: its peak, and what a rank on the CPU has freed and will want again."""

import ctypes
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Let the C library keep what it frees; whether it can (glibc).

    glibc gives a large tensor's pages back to the kernel as soon as it is freed, and every step
    pays for zeroed pages again. Here large tensors come from the heap, which never shrinks: see
    M_MMAP_MAX and M_TRIM_THRESHOLD in mallopt(3). The peak stays what it was; what lies between
    peaks is no longer lent to other programs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank since its start.

    On a GPU the most that torch's allocator had handed out at once (``max_memory_allocated``); on a
    CPU the largest resident set of this process, without its data workers.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux: getrusage(2) may report the peak of the launcher that forked this process
        status = _STATUS.read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
