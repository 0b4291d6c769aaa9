"""Which part of the model and of the batch a rank holds."""

from dataclasses import dataclass

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings


@dataclass(frozen=True)
class Position:
    """A rank's place in every parallel dimension, counted from 0."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int


def position(settings: Settings, world_size: int, rank: int) -> Position:
    """The place of ``rank``: megatron-core's order tp-cp-ep-dp-pp, the first varying fastest.

    Attention and dense layers see tp-cp-dp-pp, expert layers see etp-ep-edp-pp
    (megatron-core, parallel_state.py, RankGenerator).
    """
    parallel = settings.parallel
    rest, tensor = divmod(rank, parallel.tensor_model_parallel_size)
    rest, context = divmod(rest, parallel.context_parallel_size)
    pipeline, data = divmod(rest, derived.data_parallel_size(parallel, world_size))
    rest, expert_tensor = divmod(rank, derived.expert_tensor_parallel_size(parallel))
    rest, expert = divmod(rest, parallel.expert_model_parallel_size)
    expert_data = rest % derived.expert_data_parallel_size(parallel, world_size)
    return Position(tensor, context, data, pipeline, expert_tensor, expert, expert_data)
