"""Tensor-parallel sharding of a parameter, for optimizers that need full matrices."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class TensorShard:
    """Sharding of a parameter: the split axis, counted from the end, and the ranks."""

    axis: int
    group: dist.ProcessGroup


def shard_of(parameter: torch.Tensor, groups: ProcessGroupCollection) -> TensorShard | None:
    """Return how a parameter is sharded over (expert) tensor ranks; None: it is replicated."""
    is_expert = not getattr(parameter, "allreduce", True)
    group = groups.expt_tp if is_expert else groups.tp
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return None
    return TensorShard(parameter.partition_dim - parameter.dim(), group)  # type: ignore[attr-defined]
