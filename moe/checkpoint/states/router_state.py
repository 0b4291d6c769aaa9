"""State that routers need for training alone."""

from collections.abc import Collection

from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

ROUTER_STATE = (".router.draws.micro_batches", ".router.previous_choices")
"""Ends of names: the position of random draws, and the choices of the last step."""


def is_wanted(
    entry: ShardedObject | ShardedTensor | ShardedTensorFactory, saved: Collection[str]
) -> bool:
    """Return whether to load a model's entry from a checkpoint with the keys ``saved``.

    Weights always, so that a missing one is noticed. A router keeps its new state where the
    checkpoint has none: it was imported, or trained without jitter, say.
    """
    if isinstance(entry, ShardedObject):
        return entry.unique_key in saved
    return entry.key in saved or not entry.key.endswith(ROUTER_STATE)
