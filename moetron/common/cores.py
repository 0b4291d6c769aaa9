"""Number of CPU cores that this process may use: its affinity and its cgroup's CPU quota."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the cores of the affinity mask, at most the whole cores of the CPU quota, at least 1.

    SLURM and taskset restrict the affinity; containers have a quota instead (``docker --cpus``,
    Kubernetes ``limits.cpu``).
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """Yield the CPU quota, in cores, of each cgroup from this process's up to the root."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:  # hierarchy:controllers:path; version 2 has one line, "0::path"
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, read = CGROUPS, _quota_v2
        elif "cpu" in controllers.split(","):
            root, read = CGROUPS / "cpu", _quota_v1
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                quota = read(root / folder)
            except (OSError, ValueError):  # no such controller here, or no such file at the root
                continue
            if quota is not None:
                yield quota


def _quota_v2(folder: Path) -> float | None:
    """Read ``cpu.max``: "QUOTA PERIOD" in microseconds, or "max PERIOD"."""
    quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    """Read ``cpu.cfs_quota_us``, -1 where there is none, and ``cpu.cfs_period_us``."""
    quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
    period = int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    return None if quota < 0 else quota / period
