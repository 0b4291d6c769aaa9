"""Global tensors of a sharded model: distribute weights, collect the shards of ranks.

Shards are those of ``sharded_state_dict``, so that a test that uses this also tests them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import unwrap_model

from moetron.moe.checkpoint.optimizer_state import MOMENTS, PREFIX, sharded_optimizer_state
from moetron.moe.checkpoint.save_load import MODEL_METADATA
from moetron.moe.training.trainer import Trainer

Read = Callable[[torch.nn.Parameter], torch.Tensor]


def _shards(model: Sequence[torch.nn.Module], read: Read) -> Iterator[ShardedTensor]:
    metadata = ensure_metadata_has_dp_cp_group(None)
    for chunk in model:
        for entry in chunk.sharded_state_dict(metadata=metadata).values():
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                continue
            if not isinstance(entry.data, torch.nn.Parameter):
                continue  # a buffer
            data = read(entry.data)
            cast = {"dtype": data.dtype} if isinstance(entry, ShardedTensor) else {}
            yield from _pieces(replace(entry, data=data, **cast))


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    built = {"": entry}
    apply_factories(built)
    pieces = built[""]
    return pieces if isinstance(pieces, list) else [pieces]


def fill(model: Sequence[torch.nn.Module], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy each rank's shards of the global tensors into its parameters."""
    with torch.no_grad():
        for shard in _shards(model, lambda parameter: parameter.detach()):
            shard.data.copy_(tensors[shard.key][shard.global_slice()])


def local_shards(model: Sequence[torch.nn.Module], read: Read) -> list[dict[str, Any]]:
    """Return this rank's shards of ``read(parameter)`` for every parameter, for `assemble`."""
    return [_plain(shard) for shard in _shards(model, read)]


def local_moments(trainer: Trainer) -> list[dict[str, Any]]:
    """Return this rank's shards of the optimizer's first moment, for `assemble` (collective)."""
    model_state: dict[str, Any] = {
        str(number): chunk.sharded_state_dict(metadata=dict(MODEL_METADATA))
        for number, chunk in enumerate(unwrap_model(trainer.chunks))
    }
    prefix = f"{PREFIX}.{MOMENTS[trainer.settings.optimizer.optimizer][0]}."
    shards = (
        piece
        for key, entry in sharded_optimizer_state(trainer.optimizer, model_state).items()
        if key.startswith(prefix)
        for piece in _pieces(entry)
    )
    return [_plain(replace(shard, key=shard.key.removeprefix(prefix))) for shard in shards]


def _plain(shard: ShardedTensor) -> dict[str, Any]:
    return {
        "key": shard.key,
        "shape": list(shard.global_shape),
        "slice": [
            [part, part + 1, 1] if isinstance(part, int) else [part.start, part.stop, 0]
            for part in shard.global_slice()
        ],
        "data": shard.data.detach().cpu().clone(),
    }


def assemble(ranks: Iterable[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """Assemble global tensors from the shards of all ranks.

    Raises:
        AssertionError: replicas differ, or a part of a tensor is on no rank.
    """
    tensors: dict[str, torch.Tensor] = {}
    for shard in (shard for shards in ranks for shard in shards):
        full = tensors.setdefault(shard["key"], torch.full(shard["shape"], float("nan")))
        where = full[tuple(slice(start, stop) for start, stop, _ in shard["slice"])]
        data = shard["data"].float().view(where.shape)
        written = ~where.isnan()
        torch.testing.assert_close(where[written], data[written], msg=f"replicas: {shard['key']}")
        where.copy_(data)
    for key, full in tensors.items():
        assert not full.isnan().any(), f"{key} is incomplete"
    return tensors
