"""Global tensors of a checkpoint of ours, read and written one at a time.

Nothing here builds a model or needs other ranks: a checkpoint of any layout is a set of named
global tensors (torch.distributed.checkpoint), whichever rank wrote which part.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moetron.moe.checkpoint.optimizer_state import MAIN, PREFIX
from moetron.moe.checkpoint.tensor_reader import IndexedReader

_NOT_WEIGHTS = ("optimizer.", "rng.")


class CheckpointTensors:
    """The weights of the checkpoint in ``folder``, by name.

    Args:
        folder: a step folder that has been verified (`checkpoint_folder.read`).
        exact: take the optimizer's fp32 main parameters where the checkpoint has them.
    """

    def __init__(self, folder: Path, exact: bool = False) -> None:
        self._reader = IndexedReader(folder)
        entries = self._reader.index.state_dict_metadata
        self._stored = {
            name: self._best(name) if exact else name
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_WEIGHTS)
        }

    def _best(self, name: str) -> str:
        main = f"{PREFIX}.{MAIN}.{name}"
        return main if main in self._reader.index.state_dict_metadata else name

    def names(self) -> list[str]:
        """Names of all weights."""
        return list(self._stored)

    def empty(self, name: str, device: str = "meta") -> Tensor:
        """A tensor of that shape and type without values."""
        entry = self._reader.index.state_dict_metadata[self._stored[name]]
        assert isinstance(entry, TensorStorageMetadata)
        return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        tensor = self.empty(name, "cpu")
        dcp.load({self._stored[name]: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


class _LazyPlanner(dcp.DefaultSavePlanner):
    """Makes each tensor when its turn to be written comes."""

    def __init__(self, produce: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._produce = produce

    def resolve_data(self, write_item: Any) -> Tensor:
        return self._produce(write_item.index.fqn)


def write_tensors(
    folder: Path, shapes: Mapping[str, Tensor], produce: Callable[[str], Tensor]
) -> None:
    """Write a checkpoint of weights into ``folder``, as megatron-core's dist_checkpointing does.

    Args:
        folder: exists.
        shapes: name -> meta tensor of the whole.
        produce: gives the values; called once a name, in any order.
    """
    # Of each file torch keeps every tensor in memory until the file is whole: so one file a tensor.
    writer = dcp.FileSystemWriter(
        folder, single_file_per_rank=False, thread_count=1, sync_files=True
    )
    dcp.save(
        dict(shapes),
        storage_writer=writer,
        planner=_LazyPlanner(produce),
        no_dist=True,
    )
    torch.save({}, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist"), str(folder))
