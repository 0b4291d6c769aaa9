"""Position of a rank in a parallel layout."""

from dataclasses import dataclass

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings


@dataclass(frozen=True)
class Position:
    """Index of a rank in every parallel dimension."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int


def position(settings: Settings, world_size: int, rank: int) -> Position:
    """Return the position of ``rank`` in megatron-core's order tp-cp-ep-dp-pp, tp fastest.

    Attention and dense layers have tp-cp-dp-pp, expert layers etp-ep-edp-pp (megatron-core,
    parallel_state.py, RankGenerator).
    """
    parallel = settings.parallel
    rest, tensor = divmod(rank, parallel.tensor_model_parallel_size)
    rest, context = divmod(rest, parallel.context_parallel_size)
    pipeline, data = divmod(rest, derived.data_parallel_size(parallel, world_size))
    rest, expert_tensor = divmod(rank, derived.expert_tensor_parallel_size(parallel))
    rest, expert = divmod(rest, parallel.expert_model_parallel_size)
    expert_data = rest % derived.expert_data_parallel_size(parallel, world_size)
    return Position(tensor, context, data, pipeline, expert_tensor, expert, expert_data)
