"""Writing and reading checkpoints one tensor at a time."""

import weakref
from pathlib import Path

import torch

from moetron.moe.convert.checkpoint_tensors import CheckpointTensors, write_tensors

SHAPES = {f"decoder.layers.{layer}.weight": torch.empty(3, 2, device="meta") for layer in range(6)}


def test_tensors_round_trip_and_are_freed(tmp_path: Path) -> None:
    """When a tensor is produced, at most the previous one is still in memory."""
    made: dict[str, weakref.ref[torch.Tensor]] = {}
    alive = []

    def produce(name: str) -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in made.values()))
        tensor = torch.full((3, 2), float(name.split(".")[2]))
        made[name] = weakref.ref(tensor)
        return tensor

    write_tensors(tmp_path, SHAPES, produce)
    assert len(alive) == len(SHAPES)
    assert max(alive) <= 1
    tensors = CheckpointTensors(tmp_path)
    assert sorted(tensors.names()) == sorted(SHAPES)
    for name in SHAPES:
        assert tensors.empty(name).is_meta
        assert (tensors.read(name) == float(name.split(".")[2])).all()
