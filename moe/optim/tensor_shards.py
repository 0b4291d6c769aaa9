"""How tensor ranks share a parameter, for optimizers that must see whole matrices."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut: its axis, from the end, and the ranks that share it."""

    axis: int
    group: dist.ProcessGroup


def cut_of(parameter: torch.Tensor, groups: ProcessGroupCollection) -> Cut | None:
    """How tensor ranks (of experts: theirs) share a parameter; None: it is whole."""
    is_expert = not getattr(parameter, "allreduce", True)
    group = groups.expt_tp if is_expert else groups.tp
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return None
    return Cut(parameter.partition_dim - parameter.dim(), group)  # type: ignore[attr-defined]
