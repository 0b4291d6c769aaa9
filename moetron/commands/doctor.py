"""Report what this machine can run, and why it cannot run the rest.

    moetron doctor [--json]

Changes nothing and uses no network. Exit codes: 0 training can run here, 1 a requirement of every
run is missing.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from moetron import __version__
from moetron.common.cores import usable_cores
from moetron.common.packages import installed_version
from moetron.common.threads import cpu_threads
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.monitoring.library_warnings import quieten_libraries

State = Literal["ok", "absent", "broken"]
NEEDED = ("torch", "megatron-core", "numpy", "sentencepiece", "pydantic", "psutil")
OPTIONAL = {
    "transformers": ("hf", "HuggingFace folders: exports are checked, models analysed"),
    "lm_eval": ("eval", "evaluate: tasks of lm-evaluation-harness"),
    "gigatoken": ("fast", "prepare: BPE at several times the reference's speed"),
    "pyarrow": ("arrow", "prepare: Parquet, Arrow and saved datasets"),
    "zstandard": ("zstd", "prepare: .zst files"),
    "ray": ("ray", "prepare on several machines"),
    "wandb": ("log", "Weights & Biases"),
    "scipy": ("base", "--moe-router-type base"),
}
"""Distribution -> (extra that installs it, feature that needs it)."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str
    state: State
    detail: str


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return parser


def packages() -> Iterator[Finding]:
    """Check required and optional packages."""
    for name in NEEDED:
        found = installed_version(name)
        yield Finding(name, "ok" if found else "broken", found or "missing: pip install moetron")
    for name, (extra, use) in OPTIONAL.items():
        found = installed_version(name)
        detail = f"{found}: {use}" if found else f"pip install 'moetron[{extra}]' for {use}"
        yield Finding(name, "ok" if found else "absent", detail)


def machine() -> Iterator[Finding]:
    """Check cores, threads and memory of this process."""
    import psutil

    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform()}")
    cores, threads = usable_cores(), cpu_threads(0, 1)
    yield Finding("CPU", "ok", f"{cores} usable cores; one rank would take {threads} threads")
    free, total = (getattr(psutil.virtual_memory(), key) / 2**30 for key in ("available", "total"))
    yield Finding("memory", "ok", f"{free:.1f} of {total:.1f} GiB available")
    shared = Path("/dev/shm")
    if shared.is_dir():
        room = os.statvfs(shared)
        detail = f"{room.f_bavail * room.f_frsize / 2**30:.1f} GiB for --num-workers"
        yield Finding("shared memory", "ok", detail)


def devices() -> Iterator[Finding]:
    """Check CUDA and Transformer Engine as a run does, and the collectives."""
    quieten_libraries()
    import torch

    from moetron.moe.host.usable import cuda_fault, transformer_engine_fault

    fault = cuda_fault()
    if fault is None:
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        yield Finding("CUDA", "ok", f"{torch.version.cuda}: {', '.join(names)}")
    else:
        state: State = "broken" if fault.is_broken else "absent"
        yield Finding("CUDA", state, f"{fault.reason}; runs use the CPU over gloo")
    te_fault = transformer_engine_fault()
    installed = installed_version("transformer-engine")
    if te_fault is None:
        yield Finding("Transformer Engine", "ok", str(installed))
    else:
        state = "broken" if installed and fault is None else "absent"
        yield Finding("Transformer Engine", state, f"{te_fault}; layers are the local ones")
    found = {
        "gloo": torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_nccl_available(),
    }
    backends = [name for name, there in found.items() if there]
    yield Finding("collectives", "ok" if backends else "broken", ", ".join(backends) or "none")


def main() -> int:
    """Run and print all checks; return the exit code."""
    arguments = parser().parse_args()
    found = [Finding("Moetron", "ok", __version__), *machine(), *packages(), *devices()]
    if arguments.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        width = max(len(one.name) for one in found)
        for one in found:
            print(f"{one.name:{width}}  {one.state:6}  {one.detail}")
    needed = {*NEEDED, "collectives"}
    broken = [one.name for one in found if one.state == "broken" and one.name in needed]
    if broken:
        print(f"training cannot run here: {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))
