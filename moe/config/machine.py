"""Detection of GPU and Transformer Engine without importing torch.

Checks of settings use this before a run starts; `moetron.moe.host.usable` then tries them.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from moetron.common.packages import installed_version

_PROC = Path("/proc/driver/nvidia/version")
_DEVICE_FOLDER = Path("/dev")
_DEVICE_FILES = "nvidia[0-9]*"
_QUERY_TIMEOUT_S = 20


def nvidia_driver() -> str | None:
    """Return evidence of an NVIDIA driver (a path), or None.

    Containers may lack the entry in /proc, and WSL the device files; `nvidia-smi` is tried last.
    """
    if _PROC.exists():
        return str(_PROC)
    if found := sorted(_DEVICE_FOLDER.glob(_DEVICE_FILES)):
        return str(found[0])
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return program if listed.returncode == 0 and "GPU" in listed.stdout else None


def hidden_gpus() -> str | None:
    """Return the assignment to CUDA_VISIBLE_DEVICES if it hides every GPU, else None.

    CUDA ignores all entries from the first invalid one: an empty list, -1, SLURM's NoDevFiles.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    first = value.split(",")[0].strip()
    is_device = first.isdecimal() or first.startswith(("GPU-", "MIG-"))
    return None if is_device else f"CUDA_VISIBLE_DEVICES={value}"


def expected_device(wanted: str) -> Literal["cpu", "cuda"]:
    """Return the device of ``--device wanted``, judging by the driver."""
    if wanted == "auto":
        return "cpu" if hidden_gpus() is not None or nvidia_driver() is None else "cuda"
    return "cuda" if wanted == "cuda" else "cpu"


def transformer_engine_is_installed() -> bool:
    """Return whether Transformer Engine is installed; it may still fail to import."""
    return installed_version("transformer-engine") is not None
