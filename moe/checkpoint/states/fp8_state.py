"""History of FP8 scales in a checkpoint (the host's emulation of ``delayed`` scaling).

Amaxes differ between ranks, so every rank writes its own: the key ``fp8.RANK.FIRST.NAME`` is
float32 [roles, history + 1, experts] (``Fp8Product.state``), NAME a layer's product, numbered over
the full model, and FIRST the first of the rank's experts in it. A run of the same layout resumes
from them bit by bit. In another layout a product takes the largest amax, and so the smallest scale,
of all ranks' histories: nothing saturates that did not before.

Transformer Engine keeps its own as ``_extra_state`` objects, which megatron-core saves with the
model: once for each layer and expert in any layout, since amaxes are reduced over ranks.
"""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import FileSystemReader, load

from moetron.moe.numerics.fp8_matmul import Fp8Product

logger = logging.getLogger(__name__)

PREFIX = "fp8."
_KEY = re.compile(r"fp8\.(\d+)\.(\d+)\.(.+)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Owner of a state: rank, first expert and product."""

    rank: int
    first: int
    """First expert, numbered over all ranks; 0 for a layer without experts."""
    name: str

    @property
    def key(self) -> str:
        """Its key in a checkpoint."""
        return f"{PREFIX}{self.rank}.{self.first}.{self.name}"

    @classmethod
    def of(cls, key: str) -> "Place | None":
        """Parse a key; None: it is not an FP8 state's."""
        match = _KEY.fullmatch(key)
        return None if match is None else cls(int(match[1]), int(match[2]), match[3])


def fp8_entries(model: Sequence[torch.nn.Module]) -> ShardedStateDict:
    """Return the entries to save, {key: sharded tensor}: none without delayed scaling."""
    states = {place.key: product.state() for place, _, product in _products(model)}
    return {
        key: ShardedTensor.from_rank_offsets(key, state)
        for key, state in states.items()
        if state is not None
    }


def restore_fp8(
    folder: Path, keys: Collection[str], model: Sequence[torch.nn.Module], same_layout: bool
) -> None:
    """Restore the scales of a checkpoint; products without a saved state start from 1.

    No communication: every rank reads the states that it needs.

    Args:
        folder: a verified checkpoint.
        keys: all keys of the checkpoint.
        model: this rank's chunks.
        same_layout: whether the checkpoint has the layout of this run.
    """
    saved = [place for place in map(Place.of, keys) if place is not None]
    if same_layout:
        saved = [place for place in saved if place.rank == dist.get_rank()]
    delayed = [found for found in _products(model) if found[2].numerics.recipe == "delayed"]
    names = {place.name for place, _, _ in delayed}
    states = _read(folder, [place for place in saved if place.name in names])
    unknown = 0
    for place, experts, product in delayed:
        state = _merged(place, experts, states)
        if state is None:
            unknown += 1
        else:
            product.set_state(state)
    if unknown:
        logger.warning("%s: FP8 scales of %d products start from 1", folder, unknown)
    elif delayed and not same_layout and dist.get_rank() == 0:
        logger.warning("another layout: FP8 scales follow the largest amax of the old ranks")


def _merged(place: Place, experts: int, states: dict[Place, torch.Tensor]) -> torch.Tensor | None:
    """Merge a product's states to [roles, history + 1, experts]; None if an expert has none."""
    columns = []
    for expert in range(place.first, place.first + experts):
        known = [
            state[..., expert - other.first]  # [roles, history + 1]
            for other, state in states.items()
            if other.name == place.name and 0 <= expert - other.first < state.shape[-1]
        ]
        if not known:
            return None
        stacked = torch.stack(known)
        scale = stacked[..., -1:].amin(0)
        columns.append(torch.cat([stacked[..., :-1].amax(0), scale], dim=-1))
    return torch.stack(columns, dim=-1)


def _read(folder: Path, places: Sequence[Place]) -> dict[Place, torch.Tensor]:
    reader = FileSystemReader(folder)
    index: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {place.key: torch.empty(index[place.key].size) for place in places}
    load(tensors, storage_reader=reader, no_dist=True)
    return {place: tensors[place.key] for place in places}


def _products(model: Sequence[torch.nn.Module]) -> Iterator[tuple[Place, int, Fp8Product]]:
    """Yield (place, experts, product) for every product on this rank."""
    for chunk in unwrap_model(list(model)):
        for path, module in chunk.named_modules():
            if isinstance(module, Fp8Product):
                first, experts = _experts(chunk, path)
                yield Place(dist.get_rank(), first, _name(chunk, path)), experts, module


def _name(chunk: Any, path: str) -> str:
    """Return a product's name, independent of pipeline and experts' implementation."""
    name = _EXPERT.sub(".experts.", path)
    layer = _LAYER.match(name)
    if layer is None:
        return name
    number = chunk.decoder.layers[int(layer[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[layer.end() :]}"


def _experts(chunk: Any, path: str) -> tuple[int, int]:
    """Return a product's first expert, numbered over all ranks, and their count: 0, 1 if dense."""
    head, inside, _ = path.partition(".experts.")
    if not inside:
        return 0, 1
    local: int = chunk.get_submodule(f"{head}.experts").num_local_experts
    first = local * parallel_state.get_expert_model_parallel_rank()
    alone = _EXPERT.search(path)
    return (first, local) if alone is None else (first + int(alone[1]), 1)
