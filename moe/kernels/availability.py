"""Decision whether a tensor is processed by a Triton kernel."""

import importlib.util
import os
from functools import cache

import torch


@cache
def triton_is_installed() -> bool:
    """Return whether the package ``triton`` is found; torch's CUDA builds install it."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Return whether Triton runs kernels on the CPU, statement by statement (slow; for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def uses_triton(tensor: torch.Tensor) -> bool:
    """Return whether kernels process ``tensor``: on a GPU, or interpreted on a CPU."""
    return (tensor.is_cuda or is_interpreted()) and triton_is_installed()
