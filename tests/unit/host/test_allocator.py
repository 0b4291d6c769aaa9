"""Freed memory stays with the process."""

import resource
import subprocess
import sys

import pytest

LARGE_BYTES = 128 * 2**20  # above every threshold that glibc sets by itself
FAULTS = f"""
import resource
from moetron.moe.host.memory import keep_freed_memory
assert {{keep}} is False or keep_freed_memory()
b"x" * {LARGE_BYTES}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * {LARGE_BYTES}
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Prints the page faults of filling what was filled and freed before."""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_pages_are_used_again() -> None:
    faults = {}
    for keep in (False, True):
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        faults[keep] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    pages = LARGE_BYTES // resource.getpagesize()
    assert faults[False] > 0.9 * pages > 0.1 * pages > faults[True]
