"""Write a checkpoint's tensors to files, here or in the writer process while training continues."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as save_tensors
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from moetron.common.errors import RunError
from moetron.common.files import atomic_file, write_text
from moetron.moe.checkpoint.writer.shared_memory import SharedMemory

THREADS = 2
"""Files that a rank writes at once."""


class Contents(torch_strategy.TorchDistSaveShardedStrategy):
    """Save strategy that holds the tensors of a checkpoint until ``write``.

    megatron-core's own writer (strategies/filesystem_async.py) forks processes around a spawned
    manager even for a blocking save: seconds of start-up, and a hang if one of them dies.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self._parts: dict[str, list[Any]] = {}
        self.size_bytes = 0
        """Bytes of the tensors that this rank writes."""

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Keep the main replica of every tensor."""
        self._parts, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        self.size_bytes = sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that this rank writes."""
        return [part.data for part in self._sharded_tensors()]

    def store(self, memory: SharedMemory) -> None:
        """Replace the tensors by places in memory, where they are copied to."""
        self._parts = {
            key: [
                replace(part, data=memory.store(part.data))
                if isinstance(part, ShardedTensor)
                else part
                for part in parts
            ]
            for key, parts in self._parts.items()
        }

    def restore(self, memory: SharedMemory) -> None:
        """Replace places in memory by their tensors."""
        for part in self._sharded_tensors():
            part.data = memory.tensor(part.data)

    def write(self, folder: Path) -> dict[str, str]:
        """Write the held tensors and sync every file to disk; a collective over all ranks.

        Returns:
            SHA-256 of the files that this rank wrote, computed while writing.

        Raises:
            RunError: on every rank, if one of them could not write.
        """
        files = _SummingFileSystem()
        writer = _Writer(folder, files)
        planner = torch_strategy.MCoreSavePlanner(flatten_state_dict=False)
        tensors = torch_strategy.mcore_to_pyt_state_dict(self._parts)
        try:
            # torch gathers all ranks' plans on rank 0, scatters them back, and gathers the results
            # there for the index; a failure reaches all ranks.
            save_tensors(tensors, storage_writer=writer, planner=planner)
        except CheckpointException as error:  # not an Exception, for torch
            raise _readable(folder, error) from error
        return files.sums

    def _sharded_tensors(self) -> list[ShardedTensor]:
        parts = (part for parts in self._parts.values() for part in parts)
        return [part for part in parts if isinstance(part, ShardedTensor)]


def write_format_files(folder: Path, common: dict[str, Any]) -> None:
    """Write what megatron-core's format has besides tensors: its version, and an empty state."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    with atomic_file(folder / COMMON_STATE_FNAME) as file:
        file.write(buffer.getvalue())
    write_text(folder / CONFIG_FNAME, json.dumps(asdict(CheckpointingConfig("torch_dist"))))


def _readable(folder: Path, error: CheckpointException) -> Exception:
    """Return the error to raise for a failed save, without torch's tracebacks for disk errors."""
    causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
    if not all(isinstance(cause, OSError) for cause in causes.values()):
        return RuntimeError(f"cannot write {folder}: {error}")
    reasons = "; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items())
    return RunError(f"cannot write {folder}: {reasons}; checkpoints before it are untouched")


class _SummingFile(io.FileIO):
    """File written sequentially, with its SHA-256.

    Write errors are recorded in ``failures``: torch reports a broken archive instead.
    """

    def __init__(self, path: PathLike[str] | str, failures: list[Exception]) -> None:
        super().__init__(path, "wb")
        self.digest = hashlib.sha256()
        self._failures = failures

    def write(self, data: Any) -> int:
        """Write bytes and update the sum with those that were written."""
        try:
            count = super().write(data)
        except OSError as error:
            self._failures.append(error)
            raise
        self.digest.update(memoryview(data).cast("B")[:count])
        return count


class _SummingFileSystem(FileSystem):
    """File system that records the sums of the files it writes."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}
        self.failures: list[Exception] = []
        """Errors of all writing threads, the cause first."""

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[Any]:
        """Open a stream to write a file of tensors."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        try:
            file = _SummingFile(path, self.failures)
            with io.BufferedWriter(file) as stream:
                yield stream
        except Exception as error:
            self.failures.append(error)
            raise
        self.sums[Path(path).name] = file.digest.hexdigest()


@contextmanager
def _reported_here(failures: list[Exception]) -> Iterator[None]:
    """Print no traceback of a thread that ends by one of ``failures``, which are raised later."""
    usual = threading.excepthook

    def report(ended: threading.ExceptHookArgs) -> None:
        if not any(ended.exc_value is failure for failure in failures):
            usual(ended)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = usual


class _Writer(FileSystemWriter):
    """torch's writer, but raising errors of its helper threads, which would truncate files."""

    def __init__(self, folder: Path, files: _SummingFileSystem) -> None:
        super().__init__(folder, thread_count=THREADS, sync_files=True)
        self.fs = self._files = files

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's tensors, or raise the first error of any thread, on all ranks."""
        written = None
        try:
            with _reported_here(self._files.failures):
                written = super().write_data(plan, planner)
        except Exception as error:
            self._files.failures.append(error)
        if written is None or self._files.failures:
            raise self._files.failures[0]
        return written
