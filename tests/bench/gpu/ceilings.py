"""What the machine can do: rates that no program exceeds."""

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F


def time_s(function: Callable[[], object], repeats: int = 10, warm_up: int = 2) -> float:
    """Return the median duration of a call, on a GPU by its events."""
    for _ in range(warm_up):
        function()
    if not torch.cuda.is_available():
        return median(_host_s(function) for _ in range(repeats))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return median(before.elapsed_time(after) for before, after in pairwise(events)) / 1e3


def _host_s(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measured_ceilings(device: torch.device, small: bool) -> dict[str, Any]:
    """Return rates of a bf16 product, of grouped products at the bench's shapes, and of a copy."""
    size = 256 if small else 8192
    pair = torch.randn(2, size, size, device=device).bfloat16()
    seconds = time_s(lambda: pair[0] @ pair[1], 30)
    found: dict[str, Any] = {"bf16_product_tflops_per_s": 2 * size**3 / seconds / 1e12}
    rows, experts, hidden, ffn = (256, 4, 64, 32) if small else (131072, 64, 2048, 1024)
    for name, width, out in (("fc1", hidden, 2 * ffn), ("fc2", ffn, hidden)):
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        weight = torch.randn(experts, out, width, device=device, dtype=torch.bfloat16)
        ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts)
        seconds = time_s(lambda x=x, w=weight, e=ends: F.grouped_mm(x, w.transpose(1, 2), offs=e))
        found[f"grouped_mm_{name}_tflops_per_s"] = 2 * rows * width * out / seconds / 1e12
    source = torch.empty((1 << 20) if small else (1 << 30), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    seconds = time_s(lambda: target.copy_(source))
    found["copy_gb_per_s"] = 2 * source.numel() / seconds / 1e9
    return found
