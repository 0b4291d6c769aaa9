"""Reading and writing the global tensors of our checkpoints, one at a time.

No model is built and no other rank is needed: a checkpoint of any layout is a set of named global
tensors (torch.distributed.checkpoint), whichever rank wrote which part.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moetron.common.errors import UserError
from moetron.moe.checkpoint.optimizer_state import MAIN, PREFIX
from moetron.moe.checkpoint.states.router_state import ROUTER_STATE
from moetron.moe.checkpoint.tensor_reader import IndexedReader, cause_of

_NOT_WEIGHTS = ("optimizer.", "rng.")


class CheckpointTensors:
    """Weights of the checkpoint in ``folder``, by name.

    Args:
        folder: a step folder that has been verified (`checkpoint_folder.read`).
        exact: read the optimizer's fp32 main parameters if the checkpoint has them.
    """

    def __init__(self, folder: Path, exact: bool = False) -> None:
        self._folder, self._reader = folder, IndexedReader(folder)
        entries = self._reader.index.state_dict_metadata
        self._stored = {
            name: self._best(name) if exact else name
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
            and not name.startswith(_NOT_WEIGHTS)
            and not name.endswith(ROUTER_STATE)
        }

    def _best(self, name: str) -> str:
        main = f"{PREFIX}.{MAIN}.{name}"
        return main if main in self._reader.index.state_dict_metadata else name

    def names(self) -> list[str]:
        """Return the names of all weights."""
        return list(self._stored)

    def empty(self, name: str, device: str = "meta") -> Tensor:
        """Return an uninitialized tensor of the same shape and dtype."""
        entry = self._reader.index.state_dict_metadata[self._stored[name]]
        assert isinstance(entry, TensorStorageMetadata)
        return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)

    def read(self, name: str) -> Tensor:
        """Return the tensor; raise UserError if its file is damaged."""
        tensor = self.empty(name, "cpu")
        try:
            dcp.load({self._stored[name]: tensor}, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            text = f"{self._folder}: {name} cannot be read: {cause_of(error)}"
            raise UserError(text) from error
        return tensor


class _LazyPlanner(dcp.DefaultSavePlanner):
    """Save planner that produces each tensor when it is written."""

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
        folder: an existing folder.
        shapes: name -> meta tensor of the global shape.
        produce: returns the values; called once per name, in any order. Its UserError is raised.
    """
    # torch keeps all tensors of a file in memory until the file is complete: one file per tensor.
    writer = dcp.FileSystemWriter(
        folder, single_file_per_rank=False, thread_count=1, sync_files=True
    )
    try:
        dcp.save(dict(shapes), storage_writer=writer, planner=_LazyPlanner(produce), no_dist=True)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, UserError):  # of ``produce``
                raise failure from error
        raise
    torch.save({}, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist"), str(folder))
