"""Retention of freed memory, and the peak."""

import resource
import subprocess
import sys

import pytest
import torch

from moetron.moe.host.allocator import peak_memory_bytes

LARGE_BYTES = 128 * 2**20  # above every threshold that glibc sets by itself
FAULTS = f"""
import resource
from moetron.moe.host.allocator import keep_freed_memory
assert {{keep}} is False or keep_freed_memory()
b"x" * {LARGE_BYTES}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * {LARGE_BYTES}
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Program that prints page faults of refilling freed memory."""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_pages_are_used_again() -> None:
    faults = {}
    for keep in (False, True):
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        faults[keep] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    pages = LARGE_BYTES // resource.getpagesize()
    assert faults[False] > 0.9 * pages > 0.1 * pages > faults[True]


def test_the_peak_on_a_cpu_is_this_process_only() -> None:
    """Not the parent's peak (which getrusage(2) reports), nor the current size."""
    code = (
        "import torch\n"
        "from moetron.moe.host.allocator import peak_memory_bytes\n"
        "cpu = torch.device('cpu')\n"
        "before = peak_memory_bytes(cpu)\n"
        f"torch.ones({4 * LARGE_BYTES} // 4)\n"
        "print(before, peak_memory_bytes(cpu))"
    )
    large = b"x" * (12 * LARGE_BYTES)  # in the parent, while it starts the child
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < len(large)
    assert 4 * LARGE_BYTES * 0.9 < after - before < 4 * LARGE_BYTES * 1.1


def test_the_peak_on_a_gpu_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + device.index)
    assert peak_memory_bytes(torch.device("cuda", 2)) == 9
