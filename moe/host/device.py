"""Which device a rank computes on, and which backend its collectives use."""

import importlib.util
import os

import torch

from moetron.common.errors import UserError


def resolve_device(device: str) -> torch.device:
    """The rank's device for ``--device auto|cpu|cuda``.

    Raises:
        UserError: CUDA is asked for where there is none; or the CPU where there is a GPU, because
            megatron-core takes a GPU that it sees.
    """
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise UserError("--device cuda: no CUDA device is visible; use --device auto or cpu")
    if device == "cpu" and present:
        raise UserError(
            "--device cpu: a CUDA device is visible and megatron-core would use it; "
            "hide it with CUDA_VISIBLE_DEVICES= or use --device auto"
        )
    if not present:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def backend_for(device: torch.device) -> str:
    """The torch.distributed backend of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: a GPU is visible and its import succeeds.

    Without its libraries the import raises RuntimeError or OSError instead of ImportError.
    """
    if not torch.cuda.is_available() or not importlib.util.find_spec("transformer_engine"):
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True
