"""Memory that a rank on the CPU has freed and will want again."""

import ctypes

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
