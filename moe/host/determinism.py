"""Deterministic algorithms on a GPU (--deterministic-mode)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moetron.moe.config.rules.performance import DETERMINISTIC_ENVIRONMENT


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Use only deterministic algorithms of torch, cuBLAS, cuDNN, NCCL and Transformer Engine.

    Enter it before CUDA and process groups start: cuBLAS and NCCL read their variables once. They
    remain set for the process; torch's switches are restored. An operation without a deterministic
    algorithm raises a RuntimeError. Without a GPU nothing changes: a CPU repeats every bit anyway.
    """
    if not wanted or not torch.cuda.is_available():
        yield
        return
    for name, accepted in DETERMINISTIC_ENVIRONMENT.items():
        os.environ.setdefault(name, accepted[0])
    before = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    memory: Any = torch.utils.deterministic  # its attribute is untyped
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # torch would otherwise fill every new tensor with NaN, a debugging aid that costs time.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        memory.fill_uninitialized_memory = fill
