"""Requirements of tests on the machine, with the reason to skip."""

import importlib.metadata
import importlib.util

import pytest
import torch


def needs(gpus: int = 1, capability: tuple[int, int] = (8, 0)) -> pytest.MarkDecorator:
    """Skip if fewer than ``gpus`` devices of ``capability`` are visible."""
    present = torch.cuda.device_count()
    if present < gpus:
        return pytest.mark.skip(reason=f"needs {gpus} CUDA device(s), {present} visible")
    able = all(torch.cuda.get_device_capability(gpu) >= capability for gpu in range(gpus))
    reason = f"needs compute capability {capability[0]}.{capability[1]}"
    return pytest.mark.skipif(not able, reason=reason)


def needs_package(name: str, module: str) -> pytest.MarkDecorator:
    """Skip if the distribution ``name`` is not installed or ``module`` is not found."""
    try:
        importlib.metadata.version(name)
        present = importlib.util.find_spec(module) is not None
    except importlib.metadata.PackageNotFoundError:
        present = False
    return pytest.mark.skipif(not present, reason=f"needs {name}")
