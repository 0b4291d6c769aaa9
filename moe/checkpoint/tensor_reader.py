"""Load a checkpoint's tensors, and nothing else, from a safely read index."""

import io
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.utils import (
    extract_sharded_base,
    force_all_tensors_to_non_fp8,
)
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.futures import Future

from moetron.common.errors import UserError
from moetron.moe.checkpoint.checksums import Sums
from moetron.moe.checkpoint.collective_checks import on_all_ranks
from moetron.moe.checkpoint.index_reader import read_index
from moetron.moe.checkpoint.optimizer_state import is_entry
from moetron.moe.checkpoint.run_folder import Checkpoint
from moetron.moe.checkpoint.stored_tensor import FilePart, OrderedFile, find_tensor
from moetron.moe.checkpoint.unpickling import check_layer_state
from moetron.moe.host.patching import Patch

THREADS = 1 if torch_strategy.HAVE_TE else 2
"""Files that a rank reads at once: megatron-core's planner keeps one FP8 tensor's state."""


class IndexedReader(dcp.FileSystemReader):
    """Reader of tensors and, as the only objects, of the FP8 state of layers.

    torch unpickles objects without restriction; here they are checked first.
    """

    def __init__(self, folder: str | Path, sums: Sums | None = None) -> None:
        super().__init__(folder)
        self._folder, self._sums = Path(folder), sums or Sums()
        self.index: Metadata = read_index(self._folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index that was read and checked."""
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Give the planner the items of its plan; objects are checked and repacked first."""
        objects = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        for item in objects:
            planner.load_bytes(item, self._layer_state(item.storage_index))
        _require_complete(plan, planner, self.index)
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            if item.type != LoadItemType.BYTE_IO:
                path = self.index.storage_data[item.storage_index].relative_path
                by_file.setdefault(path, []).append(item)
        with ThreadPoolExecutor(THREADS) as pool:
            done = [
                pool.submit(self._read_file, self._folder / name, items, planner)
                for name, items in by_file.items()
            ]
        for file in done:
            file.result()
        return super().read_data(replace(plan, items=[]), planner)

    def _read_file(self, path: Path, items: list[ReadItem], planner: LoadPlanner) -> None:
        """Read the items of a file in its order."""
        places = self.index.storage_data
        is_summed = path.name in self._sums.wanted
        ascending = sorted(items, key=lambda item: places[item.storage_index].offset)
        with path.open("rb", buffering=0) as file:
            ordered = OrderedFile(file.fileno(), is_summed)
            for index, parts in groupby(ascending, key=lambda item: item.storage_index):
                archive = FilePart(file.fileno(), places[index].offset, places[index].length)
                self._read_tensor(ordered, archive, list(parts), planner)
            if is_summed:
                self._sums.found[path.name] = ordered.sha256()

    def _read_tensor(
        self, file: OrderedFile, archive: FilePart, items: list[ReadItem], planner: LoadPlanner
    ) -> None:
        """Read a stored tensor once, for all items that want a part of it."""
        buffered = io.BufferedReader(archive)
        stored = find_tensor(buffered)
        [item, *others] = items
        target = planner.resolve_tensor(item).detach()
        is_whole = stored is not None and tuple(item.lengths) == stored.shape
        if stored is not None and is_whole and stored.fits(target):
            file.read_into(archive.start + stored.offset, target)
            source = target
        elif stored is not None:
            source = stored.new()
            file.read_into(archive.start + stored.offset, source)
        else:
            buffered.seek(0)
            source = torch.load(buffered, map_location="cpu", weights_only=True)
        if source is not target:
            _copy_part(source, item, target)
        planner.commit_tensor(item, target)
        for item in others:
            target = planner.resolve_tensor(item).detach()
            _copy_part(source, item, target)
            planner.commit_tensor(item, target)

    def _layer_state(self, place: MetadataIndex) -> io.BytesIO:
        """Return the state of one layer: uint8 tensors, each empty or a pickle of plain data."""
        info = self.index.storage_data[place]
        with (self._folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
        try:
            states = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            for state in states if isinstance(states, list) else [states]:
                if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
                    raise TypeError(f"holds {type(state).__name__}, not a tensor of bytes")
                if state.numel():
                    check_layer_state(state.contiguous().numpy().tobytes())
        except Exception as error:  # a hostile pickle can raise anything
            raise UserError(f"{self._folder}: {place.fqn} cannot be loaded: {error}") from error
        packed = io.BytesIO()
        torch.save(states, packed)
        packed.seek(0)
        return packed


def _copy_part(source: Tensor, item: ReadItem, target: Tensor) -> None:
    part = narrow_tensor_by_index(source, item.storage_offsets, item.lengths)
    if part.size() != target.size():
        shapes = f"{tuple(part.size())} where {tuple(target.size())} is wanted"
        raise ValueError(f"{item.storage_index.fqn}: holds {shapes}")
    target.copy_(part)


def _require_complete(plan: LoadPlan, planner: LoadPlanner, index: Metadata) -> None:
    """Raise ValueError if a plan leaves elements of a tensor as they were.

    Parts of a tensor in the index do not overlap (`index_reader`), so that counting is enough. What
    the checkpoint has not is not wanted: an embedding may be padded to more rows here.
    """
    planned: dict[str, int] = {}
    for item in plan.items:
        name = item.dest_index.fqn
        planned[name] = planned.get(name, 0) + math.prod(item.lengths)
    for name, target in getattr(planner, "state_dict", {}).items():
        chunks = _create_chunk_list(target) if isinstance(target, Tensor) else []
        stored = getattr(index.state_dict_metadata[name], "size", ())
        wanted = sum(_elements_within(chunk, stored) for chunk in chunks)
        if wanted > planned.get(name, 0):
            raise ValueError(f"{name}: {planned.get(name, 0)} of {wanted} elements would be read")


def _elements_within(chunk: ChunkStorageMetadata, size: Sequence[int]) -> int:
    """Return how many elements of a part lie within a tensor of ``size``."""
    sides = zip(chunk.offsets, chunk.sizes, size, strict=True)
    return math.prod(max(0, min(offset + side, end) - offset) for offset, side, end in sides)


def cause_of(error: CheckpointException) -> str:
    """Return the first line of what the first rank reports, without tracebacks."""
    for failure, _ in error.failures.values():
        lines = str(failure).strip().splitlines()
        return f"{type(failure).__name__}: {lines[0][:300] if lines else 'no text'}"
    return "no reason given"


@contextmanager
def _indexed_readers(sums: Sums | None) -> Iterator[None]:
    """Make megatron-core read files with `IndexedReader` (strategies/torch.py:750 in 0.16.1)."""

    def reader(checkpoint_dir: str | Path, *_: Any, **__: Any) -> IndexedReader:
        return IndexedReader(checkpoint_dir, sums)

    undo = Patch(torch_strategy, "_get_filesystem_reader", reader).apply()
    try:
        yield
    finally:
        undo.apply()


def load_tensors(
    request: ShardedStateDict, folder: Path, sums: Sums | None = None
) -> ShardedStateDict:
    """Load the entries of ``request`` from a step folder (collective over all ranks).

    As megatron-core's ``dist_checkpointing.load``, but without the state of ``common.pt``, in which
    Moetron stores nothing: megatron-core would unpickle it.
    """
    force_all_tensors_to_non_fp8(request)
    dict_list_map_inplace(_merged_in_place, request)
    prepared, loaded, factories = load_preprocess(request)
    wanted, _ = extract_sharded_base(prepared)
    # All-gather over all ranks: every part of a tensor must be the main part of one rank.
    validate_sharding_integrity(determine_global_metadata(wanted)[1])
    with _indexed_readers(sums):
        merge(loaded, torch_strategy.TorchDistLoadShardedStrategy().load(wanted, folder))
    result: ShardedStateDict = apply_factory_merges(loaded, factories)
    return result


def _merged_in_place(factory: Any) -> Any:
    """Return a factory that gives its own tensor if all of its parts were read into it."""
    if not isinstance(factory, ShardedTensorFactory):
        return factory
    whole = factory.data
    memory = whole.untyped_storage().data_ptr()

    def merge_parts(parts: Any) -> Any:
        tensors = list(nested_values({"": parts}))
        inside = all(part.untyped_storage().data_ptr() == memory for part in tensors)
        if inside and sum(part.numel() for part in tensors) == whole.numel():
            return whole
        return factory.merge_fn(parts)

    return replace(factory, merge_fn=merge_parts)


def require_entries(checkpoint: Checkpoint, request: ShardedStateDict, remedy: str) -> set[str]:
    """Return the keys of a request's tensors; raise UserError if the checkpoint lacks some."""
    built, _ = extract_matching_values(request, is_entry)
    apply_factories(built)
    wanted = {entry.key for entry in nested_values(built)}
    if absent := _missing(wanted, checkpoint):
        raise UserError(f"--load {checkpoint.folder}: holds no {absent}; {remedy}")
    return wanted


def load_entries(
    checkpoint: Checkpoint, request: ShardedStateDict, sums: Sums | None = None
) -> ShardedStateDict:
    """Read the entries of ``request``; raise UserError for other shapes and damage."""
    return on_all_ranks(partial(_read, request, checkpoint.folder, sums))


def _read(request: ShardedStateDict, folder: Path, sums: Sums | None) -> ShardedStateDict:
    try:
        with without_future_warnings():
            return load_tensors(request, folder, sums)
    except (CheckpointingException, CheckpointException) as error:
        text = cause_of(error) if isinstance(error, CheckpointException) else error
        raise UserError(f"--load {folder}: damaged or of another shape: {text}") from error


def refuse_nan(checkpoint: Checkpoint, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise UserError on all ranks for tensors with NaN."""
    listed = list(tensors)

    def check() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(_has_nan, (tensor for _, tensor in listed))
        names = sorted(name for (name, _), has_nan in zip(listed, found, strict=True) if has_nan)
        if names:
            raise UserError(
                f"--load {checkpoint.folder}: {len(names)} tensors hold NaN "
                f"(rank {dist.get_rank()}): {', '.join(names[:3])}"
            )

    on_all_ranks(check)


def _has_nan(tensor: torch.Tensor) -> bool:
    """Return whether an element is NaN; the sum is NaN then, and takes a seventh of `isnan`."""
    is_suspect = tensor.is_floating_point() and bool(tensor.sum().isnan())
    return is_suspect and bool(tensor.isnan().any())  # the sum of both infinities is NaN too


@contextmanager
def without_future_warnings() -> Iterator[None]:
    """Silence torch's warnings about its deprecated functions that megatron-core still calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _missing(wanted: Collection[str], checkpoint: Checkpoint) -> str:
    """Return the first few of the ``wanted`` names that are missing; empty if none is."""
    names = sorted(set(wanted) - checkpoint.keys)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
