"""Selection of device, layer implementation and collective backend.

`moetron.moe.host.usable` tests CUDA and Transformer Engine. Outcome of each combination:

| CUDA | --device auto | cpu | cuda |
|---|---|---|---|
| no driver | CPU | CPU | refused |
| every GPU hidden | CPU, logged | CPU | refused |
| a driver, but CUDA does not start | refused | CPU | refused |
| usable | the rank's GPU | refused | the rank's GPU |

| on a GPU, Transformer Engine | --transformer-impl auto | local | transformer_engine |
|---|---|---|---|
| absent or broken | local layers, logged | local | refused |
| usable | its layers | local | its layers |
| usable, but does not support the model | local layers, logged | local | refused |

On a CPU layers are local, and `--transformer-impl transformer_engine` is refused.
"""

import logging
import os

import torch

from moetron.common.errors import ConfigError, UserError
from moetron.moe.config.checks import problems
from moetron.moe.config.machine import (
    expected_device,
    nvidia_driver,
    transformer_engine_is_installed,
)
from moetron.moe.config.rules.case import given
from moetron.moe.config.schema.implementation import beyond_transformer_engine, is_local
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.usable import cuda_fault, transformer_engine_fault

logger = logging.getLogger(__name__)

_SCALED_PRODUCTS = ((9, 0), (10, 0))
"""Compute capabilities with torch._scaled_grouped_mm."""


def prepare_device(settings: Settings) -> torch.device:
    """Select device and layers of a run, before process groups start.

    Rank 0 logs why ``--transformer-impl auto`` selects local layers on a GPU, and why ``--device
    auto`` selects the CPU of a machine with a driver.

    Raises:
        UserError: the requested device or layers are unusable.
        ConfigError: settings that fit the expected device or layers do not fit the actual ones.
    """
    device = resolve_device(settings.parallel.device)
    uses_transformer_engine(settings)
    usable = device.type == "cuda" and transformer_engine_fault() is None
    _check_again(settings, device, usable)
    note = _why_local(settings) if device.type == "cuda" else _why_cpu(settings)
    if note is not None and os.environ.get("RANK", "0") == "0":
        logger.warning("%s", note)
    return device


def resolve_device(device: str) -> torch.device:
    """Return the rank's device for ``--device auto|cpu|cuda``.

    Raises:
        UserError: CUDA is requested, or there is a driver, and CUDA is unusable; the machine has
            fewer GPUs than ranks; or the CPU is requested on a machine with a visible GPU, which
            megatron-core would use.
    """
    fault = cuda_fault()
    if device == "cpu" and fault is None:
        raise UserError(
            "--device cpu: a CUDA device is visible and megatron-core would use it; "
            "hide it with CUDA_VISIBLE_DEVICES= or use --device auto"
        )
    if fault is None:
        return _started(int(os.environ.get("LOCAL_RANK", "0")), device)
    if device == "cuda":
        raise UserError(f"--device cuda: {fault.reason}; use --device auto or cpu")
    if device == "auto" and fault.is_broken:
        raise UserError(
            f"--device auto: {fault.reason}; install a torch that fits the driver, "
            "or give --device cpu to run on the CPU"
        )
    return torch.device("cpu")


def _started(index: int, wanted: str) -> torch.device:
    """Return GPU ``index`` after initialising CUDA; a driver may be too old for its GPUs."""
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"--device {wanted}: CUDA does not start: {text}; install a torch that fits the "
            "driver, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
        ) from error
    if index >= count:
        raise UserError(
            f"LOCAL_RANK={index}, but this machine has {count} visible CUDA device(s): start at "
            f"most {count} rank(s) on it (torchrun: --nproc-per-node {count})"
        )
    return torch.device("cuda", index)


def backend_for(device: torch.device) -> str:
    """Return the torch.distributed backend of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def uses_transformer_engine(settings: Settings) -> bool:
    """Return whether layers are Transformer Engine's.

    Raises:
        UserError: it is requested, and is unusable or does not support the model.
    """
    wanted = settings.model.transformer_impl
    if wanted == "local":
        return False
    fault, beyond = transformer_engine_fault(), beyond_transformer_engine(settings)
    if wanted == "transformer_engine" and fault is not None:
        raise UserError(
            f"--transformer-impl transformer_engine: {fault}; install moetron[te] where there is a "
            "GPU, or use --transformer-impl auto"
        )
    if wanted == "transformer_engine" and beyond:
        raise UserError(
            f"--transformer-impl transformer_engine: {_lacks(settings, beyond)}; "
            "use --transformer-impl auto"
        )
    return not is_local(settings, te=fault is None)


def fp8_on_tensor_cores(settings: Settings) -> bool:
    """Return whether local layers multiply FP8 operands on tensor cores rather than emulate it.

    torch's products with one scale a row exist for some GPUs and for bfloat16 results. Of the
    recipes only tensorwise leaves the unit of a current scale to the implementation.
    """
    chosen = settings.precision
    wanted = chosen.bf16 and chosen.fp8_recipe == "tensorwise" and cuda_fault() is None
    return wanted and torch.cuda.get_device_capability() in _SCALED_PRODUCTS


def _why_cpu(settings: Settings) -> str | None:
    """Return why ``--device auto`` selects the CPU of a machine with a driver, or None."""
    fault = cuda_fault()
    if settings.parallel.device != "auto" or fault is None or nvidia_driver() is None:
        return None
    return f"--device auto: running on the CPU: {fault.reason}"


def _why_local(settings: Settings) -> str | None:
    """Return why ``auto`` selects local layers on a GPU, or None."""
    if settings.model.transformer_impl != "auto":
        return None
    fault, beyond = transformer_engine_fault(), beyond_transformer_engine(settings)
    if fault is not None:
        return f"--transformer-impl auto: local layers, without Transformer Engine: {fault}"
    return (
        f"--transformer-impl auto: local layers, since {_lacks(settings, beyond)}"
        if beyond
        else None
    )


def _lacks(settings: Settings, names: list[str]) -> str:
    return f"megatron-core's Transformer Engine layers do not support {given(settings, *names)}"


def _check_again(settings: Settings, device: torch.device, te: bool) -> None:
    """Raise ConfigError for settings that fit only the expected device and layers."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    expected = expected_device(settings.parallel.device), transformer_engine_is_installed()
    if expected == (device.type, te):
        return
    known = problems(settings, ranks, device=expected[0], te=expected[1])
    found = problems(settings, ranks, device=device.type, te=te)
    if new := [problem for problem in found if problem not in known]:
        raise ConfigError(new)
