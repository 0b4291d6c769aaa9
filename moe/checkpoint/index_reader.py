"""The index of a checkpoint's tensors, rebuilt from checked values.

A checkpoint may hold only what Moetron writes: tensors, and the FP8 state of Transformer Engine's
layers. Every file that the index names must be in the checkpoint's own folder.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.moe.checkpoint.unpickling import Call, Dtype, Names, Record, index_names, load_inert

METADATA = ".metadata"
SHARD = ".distcp"
"""End of the names of files with tensors."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LAYER_STATE = re.compile(r"[\w.]+\._extra_state/shard_[0-9._]+")
_DIMENSIONS = 16
"""More than any tensor of ours has."""


class _Malformed(ValueError):
    """The index was not written by Moetron."""


def read_index(folder: Path) -> Any:
    """Return the index of a step folder's tensors as torch's ``Metadata``.

    Raises:
        UserError: the index cannot be read, names anything but the classes of an index, declares
            an object where Moetron writes tensors, or points outside ``folder``.
    """
    path = folder / METADATA
    if path.is_symlink() or not path.is_file():  # opening a FIFO would wait for ever
        raise UserError(f"{path}: damaged: missing, a link or no regular file")
    try:
        with path.open("rb") as file:
            names = index_names()
            tree = load_inert(file, names)
        return _Builder(folder, names).metadata(tree)
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: damaged, or not a checkpoint's index: {error}") from error


class _Builder:
    """Builder of torch's index classes from inert records."""

    def __init__(self, folder: Path, names: Names) -> None:
        self._folder = folder
        self._kinds = {key[1]: kind for key, kind in names.items() if isinstance(kind, type)}
        self._sizes: dict[str, int | None] = {}

    def metadata(self, tree: Any) -> Any:
        """Build the index without the writer's plan, which nothing reads."""
        from torch.distributed.checkpoint.metadata import Metadata  # seconds

        state = self._fields(tree, "Metadata")
        entries = _require(state.get("state_dict_metadata"), dict, "state_dict_metadata")
        storage = _require(state.get("storage_data"), dict, "storage_data")
        found = {}
        for name, entry in entries.items():
            found[_require(name, str, "the name of a tensor")] = self._entry(name, entry)
        places = dict(self._place(key, value) for key, value in storage.items())
        self._refuse_overlaps(places.values())
        kept = {place: info for place, info in places.items() if place.fqn in found}
        for name, entry in found.items():
            _refuse_size(name, entry, kept)
        return Metadata(state_dict_metadata=found, storage_data=kept)

    def _refuse_overlaps(self, infos: Iterable[Any]) -> None:
        """Refuse parts beyond the end of their file, and bytes that belong to two parts."""
        ends: dict[str, int] = {}
        for info in sorted(infos, key=lambda info: (info.relative_path, info.offset, info.length)):
            name, end = info.relative_path, info.offset + info.length
            if info.length and info.offset < ends.get(name, 0):
                raise _Malformed(f"two parts share bytes of {name}")
            if end > (self._sizes[name] or 0):
                raise _Malformed(f"a part is beyond the end of {name}")
            ends[name] = max(end, ends.get(name, 0))

    def _entry(self, name: str, entry: Any) -> Any:
        import torch
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        if type(entry) is self._kinds["BytesStorageMetadata"]:
            if _LAYER_STATE.fullmatch(name) is None:
                raise _Malformed(f"{name} is an object; a checkpoint of Moetron holds tensors")
            return BytesStorageMetadata()
        state = self._fields(entry, "TensorStorageMetadata")
        size = self._size(state.get("size"))
        chunks = _require(state.get("chunks"), list, f"the list of parts of {name}")
        return TensorStorageMetadata(
            TensorProperties(dtype=self._dtype(name, state.get("properties"))),
            torch.Size(size),
            [self._chunk(name, size, chunk) for chunk in chunks],
        )

    def _chunk(self, name: str, size: Sequence[int], chunk: Any) -> Any:
        import torch
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        part = self._fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = self._size(part.get("offsets")), self._size(part.get("sizes"))
        same = len(offsets) == len(sizes) == len(size)
        if not same or any(o + s > n for o, s, n in zip(offsets, sizes, size, strict=True)):
            raise _Malformed(f"a part of {name} is outside of it")
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    def _dtype(self, name: str, properties: Any) -> Any:
        import torch

        kind = self._kinds["TensorProperties"]
        if not isinstance(properties, Record) or type(properties) is not kind:
            raise _Malformed(f"{name} has no properties")
        state = properties.state
        found = state[0] if isinstance(state, tuple) and len(state) == 5 else None
        if not isinstance(found, Dtype):
            raise _Malformed(f"{name} has no number format")
        return getattr(torch, found.name)

    def _place(self, key: Any, value: Any) -> tuple[Any, Any]:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex

        index, info = self._fields(key, "MetadataIndex"), self._fields(value, "_StorageInfo")
        name = _require(index.get("fqn"), str, "the name of a tensor")
        number, offset = index.get("index"), index.get("offset")
        if number is not None:
            number = _natural(number, f"the number of a part of {name}")
        if offset is not None:
            offset = torch.Size(self._size(offset))
        if info.get("transform_descriptors"):
            raise _Malformed(f"a part of {name} is transformed")
        start, length = (_natural(info.get(field), name) for field in ("offset", "length"))
        place = MetadataIndex(name, offset, number)
        return place, _StorageInfo(self._file(info.get("relative_path")), start, length)

    def _file(self, name: Any) -> str:
        """Check the name of a file directly in the folder and return it."""
        name = _require(name, str, "the name of a file")
        if name not in self._sizes:
            path = self._folder / name
            plain = _FILE_NAME.fullmatch(name) is not None
            ours = plain and path.is_file() and not path.is_symlink()
            self._sizes[name] = path.stat().st_size if ours else None
        if self._sizes[name] is None:
            raise _Malformed(f"it names {name[:80]!r}, which is no file of the checkpoint")
        return str(name)

    def _size(self, value: Any) -> Sequence[int]:
        if not isinstance(value, Call) or type(value) is not self._kinds["Size"]:
            raise _Malformed("a size is not one")
        numbers = _require(value.arguments[0] if value.arguments else None, tuple, "a size")
        if len(numbers) > _DIMENSIONS:
            raise _Malformed("a tensor has too many dimensions")
        return [_natural(number, "a size") for number in numbers]

    def _fields(self, record: Any, kind: str) -> Mapping[str, Any]:
        if not isinstance(record, Record) or type(record) is not self._kinds[kind]:
            raise _Malformed(f"it holds {type(record).__name__} in place of {kind}")
        return _require(record.state, dict, kind)


def _refuse_size(name: str, entry: Any, places: Mapping[Any, Any]) -> None:
    """Refuse a tensor that is larger than its parts, or a part larger than its bytes on disk.

    So nothing allocates more than the files hold.
    """
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    if not isinstance(entry, TensorStorageMetadata):
        return
    for chunk in entry.chunks:
        info = places.get(MetadataIndex(name, chunk.offsets))
        needed = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
        if needed > (0 if info is None else info.length):
            raise _Malformed(f"a part of {name} has {needed} bytes, more than are stored")
    if math.prod(entry.size) > sum(math.prod(chunk.sizes) for chunk in entry.chunks):
        raise _Malformed(f"{name} is larger than its parts")
    if len(entry.chunks) > 1 and _overlap(entry.chunks):
        raise _Malformed(f"parts of {name} overlap, so that others of it may be missing")


def _overlap(chunks: Sequence[Any]) -> bool:
    """Return whether an element is in two parts; parts without elements are in none."""
    import torch

    full = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    starts = torch.tensor([list(chunk.offsets) for chunk in full])  # [parts, dimensions]
    ends = starts + torch.tensor([list(chunk.sizes) for chunk in full])
    for number in range(len(full) - 1):
        later = slice(number + 1, None)
        apart = (ends[number] <= starts[later]) | (ends[later] <= starts[number])
        if not bool(apart.any(dim=1).all()):
            return True
    return False


def _require(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise _Malformed(f"{what} is {type(value).__name__}, not {kind.__name__}")
    return value


def _natural(value: Any, what: str) -> int:
    if type(value) is not int:  # not shown: nested tuples of one tuple never end
        raise _Malformed(f"{what} is {type(value).__name__}, not int")
    if not 0 <= value < 1 << 63:
        raise _Malformed(f"{what} is out of range")
    return value
