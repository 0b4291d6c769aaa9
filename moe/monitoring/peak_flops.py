"""The peak rate of one rank's device, against which MFU is measured."""

import time

import torch

from moetron.moe.config.bridge import params_dtype
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.hardware import peak_tflops_per_s

_SIZE = 1024
_REPETITIONS = 12


def peak_of_rank(settings: Settings, device: torch.device) -> float | None:
    """TFLOP/s: as given, from the table of accelerators, or measured on a CPU; None: unknown."""
    if settings.logging.peak_tflops_per_s is not None:
        return settings.logging.peak_tflops_per_s
    if device.type == "cuda":
        return peak_tflops_per_s(torch.cuda.get_device_name(device))
    return measured_peak(params_dtype(settings))


def measured_peak(dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of a few square products on this CPU with this rank's threads.

    All ranks of a host must measure at the same time, since they share its cores and caches.
    """
    left, right = torch.rand(2, _SIZE, _SIZE).to(dtype)
    fastest_s = float("inf")
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        torch.mm(left, right)
        fastest_s = min(fastest_s, time.perf_counter() - start)
    return 2 * _SIZE**3 / fastest_s / 1e12
