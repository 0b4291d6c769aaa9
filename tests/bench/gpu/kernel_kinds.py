"""Kernels of a profile: their names, kinds and times."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType

KINDS = {
    "grouped gemm": r"group(ed)?_?(gemm|mm|problem)|GroupProblemShape",
    "attention": r"flash|fmha|sdpa|attention|fused_attn",
    "gemm": r"gemm|nvjet|cutlass|xmma|gemv|splitk",
    "optimizer": r"adam|multi_tensor|lpnorm|l2norm|foreach",
    "communication": r"nccl",
    "cross-entropy": r"cross_?entropy|softmax|nll|^(forward|backward)_kernel",
    "experts' activation": r"swiglu|^_(forward|backward)_kernel",
    "norm": r"norm|ln_(fwd|bwd)",
    "permute, gather, sort": (
        r"permute|gather|scatter|index|sort|topk|radix|bincount|histogram|combine|plan_kernel"
    ),
    "copy, fill, cat": r"memcpy|memset|copy|fill|catarray|transpose",
    "add": r"functor_add|addfunctor|add_kernel",
    "cast to fp8": r"(?<!with)(?<!broad)cast|quantize|amax",
    "other elementwise": r"elementwise|reduce|triton|silu|act|rotary|rope|scan|cumsum",
}
"""Kind -> pattern of its kernels' names; the first that matches counts."""
_PATTERNS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in KINDS.items()}


@dataclass(frozen=True)
class Kernel:
    """A kernel, copy or fill that ran on the device."""

    name: str
    start_ns: int
    end_ns: int

    @property
    def ms(self) -> float:
        """Return its duration."""
        return (self.end_ns - self.start_ns) / 1e6


def kernels_of(profiler: Any) -> list[Kernel]:
    """Return what ran on the device, from a finished torch.profiler's raw events (fast)."""
    return [
        Kernel(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
        and not event.is_user_annotation()
        and not event.name().endswith(" Sync")
    ]


def busy_ms(kernels: list[Kernel]) -> float:
    """Return the length of the union of the kernels' intervals."""
    busy, reached = 0, 0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_ns):
        busy += max(0, kernel.end_ns - max(reached, kernel.start_ns))
        reached = max(reached, kernel.end_ns)
    return busy / 1e6


def longest_gaps(kernels: list[Kernel], rows: int) -> list[str]:
    """Return the longest times without a kernel, and the kernels around them, as text."""
    gaps, reached, last = [], None, ""
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_ns):
        if reached is not None and kernel.start_ns > reached:
            gaps.append(((kernel.start_ns - reached) / 1e3, last, kernel.name))
        if reached is None or kernel.end_ns > reached:
            reached, last = kernel.end_ns, kernel.name
    gaps.sort(reverse=True)
    return [f"{us:9.1f} us  {before[:70]} -> {after[:70]}" for us, before, after in gaps[:rows]]


def kind_of(name: str) -> str:
    """Return the kind of a kernel, by its name."""
    return next((kind for kind, found in _PATTERNS.items() if found.search(name)), "other")


def by_kind(kernels: list[Kernel]) -> dict[str, float]:
    """Return the summed milliseconds of each kind, longest first."""
    total: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        total[kind_of(kernel.name)] += kernel.ms
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def table_of(kernels: list[Kernel], steps: int, rows: int) -> str:
    """Return the kinds and the longest kernels of a step, as text."""
    names: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        names[kernel.name].append(kernel.ms)
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))
    total = sum(kernel.ms for kernel in kernels)
    lines = [
        f"A step: busy {busy_ms(kernels) / steps:.2f} ms, sum {total / steps:.2f} ms, "
        f"{len(kernels) / steps:.0f} kernels",
        "",
        *(f"{ms / steps:9.2f} ms  {kind}" for kind, ms in by_kind(kernels).items()),
        "",
        f"{'ms a step':>9} {'calls':>7} {'us each':>8}  kind, kernel",
    ]
    for name, times in longest[:rows]:
        each = sum(times) / len(times) * 1e3
        lines.append(
            f"{sum(times) / steps:9.2f} {len(times) / steps:7.1f} {each:8.1f}  "
            f"{kind_of(name)}: {name[:150]}"
        )
    rest = sum(sum(times) for _, times in longest[rows:])
    return "\n".join([*lines, f"{rest / steps:9.2f} ms in {max(0, len(longest) - rows)} others\n"])
