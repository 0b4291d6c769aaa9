"""Peak rate of one rank's device, the reference of MFU."""

import time
from dataclasses import dataclass

import torch

from moetron.moe.config.bridge import params_dtype
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.hardware import peak_tflops_per_s

_SIZE = 1024
_REPETITIONS = 12
GIVEN = "given by --peak-tflops-per-s"
DATASHEET = "datasheet, dense bf16"


@dataclass(frozen=True)
class Peak:
    """Rate of MFU 100 %."""

    tflops_per_s: float
    """Peak of one rank."""
    basis: str
    """Source of the rate, for the log."""


def peak_of_rank(settings: Settings, device: torch.device) -> Peak | None:
    """Return the given peak, that of the accelerator table, or a CPU's measured; None: unknown."""
    if settings.logging.peak_tflops_per_s is not None:
        return Peak(settings.logging.peak_tflops_per_s, GIVEN)
    if device.type == "cuda":
        rate = peak_tflops_per_s(torch.cuda.get_device_name(device))
        return None if rate is None else Peak(rate, DATASHEET)
    return measured_peak(params_dtype(settings))


def measured_peak(dtype: torch.dtype) -> Peak:
    """Measure the fastest of a few square products on this CPU with this rank's threads.

    All ranks of a host must measure at the same time, since they share its cores and caches.
    """
    own = torch.Generator()  # the run's generators must not depend on what is measured
    left, right = torch.rand(2, _SIZE, _SIZE, generator=own).to(dtype)
    fastest_s = float("inf")
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        torch.mm(left, right)
        fastest_s = min(fastest_s, time.perf_counter() - start)
    kind, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    basis = f"measured at start: fastest {_SIZE}^3 {kind} product, {threads} threads"
    return Peak(2 * _SIZE**3 / fastest_s / 1e12, basis.replace(", 1 threads", ", 1 thread"))
