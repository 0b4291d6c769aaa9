"""Single kernels at the bench's shapes: milliseconds, TFLOP/s and GB/s, and errors as they are."""

import gc
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.bench.gpu import attention_kernels, expert_kernels, our_kernels
from tests.bench.gpu.ceilings import measured_ceilings, time_s
from tests.bench.gpu.kernel_case import Case, Group, Shape

GROUPS: list[Group] = [
    *our_kernels.GROUPS,
    *expert_kernels.GROUPS,
    *attention_kernels.GROUPS,
    *our_kernels.SLOW_GROUPS,
]


@dataclass(frozen=True)
class Timed:
    """One line of the table."""

    group: str
    case: str
    ms: float | None = None
    tflops_per_s: float | None = None
    of_product: float | None = None
    """Of the rate of a large bf16 matrix product."""
    gb_per_s: float | None = None
    of_copy: float | None = None
    """Of the rate of a large copy."""
    error: str | None = None


def run_kernels(device: torch.device, folder: Path, only: re.Pattern[str], small: bool) -> None:
    """Time the cases of matching groups; write kernels.md and kernels.json as they come."""
    ceilings = measured_ceilings(device, small)
    print(ceilings, flush=True)
    shape = Shape.small(device) if small else Shape(device)
    rows: list[Timed] = []
    for group in GROUPS:
        if only.search(group.__name__):
            for timed in _group(group, shape, ceilings):
                print(_line(timed), flush=True)
                rows.append(timed)
            write(folder, ceilings, rows)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _group(group: Group, shape: Shape, ceilings: dict[str, Any]) -> Iterator[Timed]:
    """Yield the lines of a group; one with its error, if it cannot be prepared."""
    name = group.__name__.strip("_")
    try:
        cases = list(group(shape))
    except Exception as error:  # a missing kernel is a result
        yield Timed(name, "", error=_text(error))
        return
    for case in cases:
        yield _case(name, case, ceilings)


def _case(group: str, case: Case, ceilings: dict[str, Any]) -> Timed:
    try:
        seconds = time_s(case.run)
    except Exception as error:  # an unsupported layout is a result
        return Timed(group, case.name, error=_text(error))
    tflops = case.flops / seconds / 1e12 if case.flops else None
    rate = case.moved_bytes / seconds / 1e9 if case.moved_bytes else None
    return Timed(
        group,
        case.name,
        seconds * 1e3,
        tflops,
        tflops and tflops / ceilings["bf16_product_tflops_per_s"],
        rate,
        rate and rate / ceilings["copy_gb_per_s"],
    )


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _line(row: Timed) -> str:
    if row.error is not None:
        return f"| {row.group} | {row.case} | {row.error} |"
    forms: list[tuple[float | None, Callable[[float], str]]] = [
        (row.ms, "{:.3f}".format),
        (row.tflops_per_s, "{:.0f}".format),
        (row.of_product, "{:.0%}".format),
        (row.gb_per_s, "{:.0f}".format),
        (row.of_copy, "{:.0%}".format),
    ]
    cells = ["" if value is None else form(value) for value, form in forms]
    return f"| {' | '.join([row.group, row.case, *cells])} |"


def write(folder: Path, ceilings: dict[str, Any], rows: list[Timed]) -> None:
    """Write the table so far."""
    head = [f"{name}: {value:.0f}" for name, value in ceilings.items()]
    columns = "| group | case | ms | TFLOP/s | of product | GB/s | of copy |"
    lines = ["# Kernels", "", ", ".join(head), "", columns, "| --- " * 7 + "|"]
    text = "\n".join([*lines, *map(_line, rows)]) + "\n"
    (folder / "kernels.md").write_text(text, encoding="utf-8")
    found = {"ceilings": ceilings, "rows": [vars(row) for row in rows]}
    (folder / "kernels.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
