"""Limits of the system that a run would hit later, checked at its start, in words.

Without torch, whose own answers to them are a bare RuntimeError, or none.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from moetron.common.errors import ConfigError

FILES, FILES_A_PEER, FILES_A_WORKER = 128 + 256, 24, 8
"""File descriptors of a rank, with the shards that it keeps mapped (data/shards/shard.py), for each
further rank and each loader worker. Measured, two ranks of the tiny recipe with two workers each:
107."""
FILES_A_GPU_PEER = 4
"""For each further rank on GPUs: rank 0 holds the job's store, to which each rank has up to three
connections, and writers of --async-save have one to each other. NCCL connects neighbours only."""
ADDRESS_SPACE = 3 << 30
"""Bytes of virtual memory of a rank. Measured peak of a rank of the tiny recipe: 2.3 GB."""
SHARED_A_WORKER = 1 << 16
"""Bytes of /dev/shm for the semaphores of a loader worker."""
SHARED = Path("/dev/shm")


def require_limits(
    world_size: int, ranks_here: int, workers: int, state_bytes: int, gpus: bool = False
) -> None:
    """Raise the limit of open files to what a run needs; refuse limits that would break the run.

    Args:
        world_size: ranks of the run.
        ranks_here: of them on this host.
        workers: loader workers of each rank.
        state_bytes: parameters, gradients and optimizer of a rank, in memory of this host.
        gpus: whether ranks have GPUs.

    Raises:
        ConfigError: a line for each limit that is too low.
    """
    own, peers = FILES + FILES_A_WORKER * workers, world_size - 1
    wanted = own + FILES_A_PEER * peers
    problems = [
        *_files(wanted, own + FILES_A_GPU_PEER * peers if gpus else wanted),
        *_address_space(ADDRESS_SPACE + state_bytes),
        *(_shared(SHARED_A_WORKER * workers * ranks_here) if workers else ()),
        *_memory(state_bytes, ranks_here),
    ]
    if problems:
        raise ConfigError(problems)


def _files(wanted: int, needed: int) -> Iterator[str]:
    """Raise the limit to ``wanted``, or as far as it goes; refuse one below ``needed``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    if hard != endless and hard < needed:
        yield (
            f"ulimit -n {hard}: a rank of this run opens up to {needed} files and connections; "
            f"raise the limit (ulimit -Hn {needed}, or LimitNOFILE, or docker --ulimit "
            f"nofile={needed})"
        )
    elif soft != endless and soft < wanted:
        limit = wanted if hard == endless else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _address_space(needed: int) -> Iterator[str]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft < needed:
        yield (
            f"ulimit -v {soft >> 10}: a rank of this run needs about {needed >> 20:,} MiB of "
            "address space, much of it never used; ulimit -v unlimited, and limit memory by a "
            "cgroup (systemd-run -p MemoryMax=..., docker --memory)"
        )


def _shared(needed: int) -> Iterator[str]:
    try:
        found = os.statvfs(SHARED)
    except OSError as error:
        yield f"--num-workers needs {SHARED}: {error.strerror}; mount it, or --num-workers 0"
        return
    free = found.f_bavail * found.f_frsize
    if free < needed:
        yield (
            f"{SHARED} has {free >> 10:,} KiB free: semaphores of loader workers need "
            f"{needed >> 10:,} KiB; delete files there, enlarge it (docker --shm-size), or "
            "--num-workers 0"
        )


def _memory(state_bytes: int, ranks_here: int) -> Iterator[str]:
    total = min(_memory_limits(), default=None)
    needed = state_bytes * ranks_here
    if total is not None and needed > total:
        yield (
            f"memory: parameters, gradients and optimizer of {ranks_here} ranks take "
            f"{needed / 2**30:,.1f} GiB, this host or its cgroup has {total / 2**30:,.1f} GiB; "
            "docs/guide/out_of_memory.md names settings that need less"
        )


def _memory_limits() -> Iterator[int]:
    """Yield the bytes of this host's memory and of the limits of this process's cgroup."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal:"):
                yield int(line.split()[1]) << 10
        path = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("::/")[2].strip()
        limit = Path("/sys/fs/cgroup", path, "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            yield int(limit)
    except OSError:  # not Linux, or cgroups of version 1
        return
