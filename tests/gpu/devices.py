"""Requirements of tests on the machine, with the reason to skip."""

import importlib.metadata
import importlib.util

import pytest
import torch

from moetron.moe.host.usable import cuda_fault, transformer_engine_fault


def gpus_fault(gpus: int = 1, capability: tuple[int, int] = (8, 0)) -> str | None:
    """Return why there are fewer than ``gpus`` usable devices of ``capability``, or None."""
    present = torch.cuda.device_count()
    if present < gpus:
        return f"needs {gpus} CUDA device(s), {present} visible"
    if any(torch.cuda.get_device_capability(gpu) < capability for gpu in range(gpus)):
        return f"needs compute capability {capability[0]}.{capability[1]}"
    return None


def needs(gpus: int = 1, capability: tuple[int, int] = (8, 0)) -> pytest.MarkDecorator:
    """Skip if fewer than ``gpus`` devices of ``capability`` are visible."""
    fault = gpus_fault(gpus, capability)
    return pytest.mark.skipif(fault is not None, reason=str(fault))


def needs_package(name: str, module: str) -> pytest.MarkDecorator:
    """Skip if the distribution ``name`` is not installed or ``module`` is not found."""
    try:
        importlib.metadata.version(name)
        present = importlib.util.find_spec(module) is not None
    except importlib.metadata.PackageNotFoundError:
        present = False
    return pytest.mark.skipif(not present, reason=f"needs {name}")


def kind_fault(te: bool, capability: tuple[int, int]) -> str | None:
    """Return why this machine cannot run an implementation, or None; a CPU runs local layers.

    Args:
        te: whether its layers are Transformer Engine's.
        capability: least compute capability of a GPU.
    """
    if te and (fault := transformer_engine_fault()):
        return f"Transformer Engine: {fault}"
    return gpus_fault(1, capability) if te or cuda_fault() is None else None


def device() -> torch.device:
    """Return the first GPU, else the CPU."""
    return torch.device("cpu" if cuda_fault() else "cuda")
