"""Sharded safetensors with an index, read and written tensor by tensor.

The safetensors library needs all tensors of a file in memory. Here the header is written first and
each tensor after it as it is produced:
https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetron.common.errors import UserError
from moetron.common.files import sync, write_text
from moetron.common.json_files import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def file_in(folder: Path, name: str) -> Path | None:
    """Return the path of a file of ``folder``, or None if there is none of this name.

    Raises:
        UserError: ``name`` is not a plain name, or a link leads out of the folder. Links into the
            ``blobs`` folder of HuggingFace's cache (models--NAME/snapshots/REVISION) are allowed.
    """
    path = folder / name
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"{folder}: {name!r} leads out of the folder")
    if not path.is_file():
        return None
    home, target = folder.resolve(), path.resolve().parent
    if target != home and (home.parent.name, target) != ("snapshots", home.parents[1] / "blobs"):
        raise UserError(f"{path}: a link that leads out of the folder; copy the file")
    return path


class TensorFolder:
    """Tensors of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = self._read_index()

    def _read_index(self) -> dict[str, str]:
        if (index := file_in(self._folder, INDEX)) is not None:
            files = read_object(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
                raise UserError(
                    f"{index}: damaged: `weight_map` is not a mapping of names to files"
                )
            return files
        if file_in(self._folder, SINGLE) is not None:
            with self._reading(SINGLE) as file:
                return dict.fromkeys(file.keys(), SINGLE)
        raise UserError(
            f"{self._folder}: neither {SINGLE} nor {INDEX}; pickled weights (.bin) are not "
            "supported: save them with safetensors"
        )

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file_of)

    def empty(self, name: str) -> Tensor:
        """Return a meta tensor of the same shape and dtype."""
        with self._reading(self._file_of[name]) as file:
            part = file.get_slice(name)
            dtypes = {text: dtype for dtype, text in DTYPES.items()}
            if part.get_dtype() not in dtypes:
                raise UserError(f"{self._folder}: {name} is {part.get_dtype()}, not a float dtype")
            return torch.empty(part.get_shape(), dtype=dtypes[part.get_dtype()], device="meta")

    def read(self, name: str) -> Tensor:
        """Return the tensor."""
        with self._reading(self._file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    @contextmanager
    def _reading(self, file_name: str) -> Iterator[safe_open]:
        """Yield an open file of the folder; raise UserError if it is missing or damaged."""
        path = file_in(self._folder, file_name)
        if path is None:
            raise UserError(f"{self._folder}: {file_name} is missing")
        try:
            with safe_open(path, "pt") as file:
                yield file
        except SafetensorError as error:
            raise UserError(f"{path}: damaged: {error}") from None


def shards(tensors: Mapping[str, Tensor], largest: int) -> list[dict[str, Tensor]]:
    """Group tensors (or meta tensors), in order, into files of at most ``largest`` bytes."""
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > largest:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    return files


def write_folder(
    folder: Path, files: Sequence[Mapping[str, Tensor]], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write shards and their index.

    Args:
        folder: an existing folder.
        files: name -> meta tensor for each file (`shards`).
        tensors: name and values, in the same order.
    """
    names = [SINGLE]
    if len(files) > 1:
        names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for name, planned in zip(names, files, strict=True):
        with (folder / name).open("wb") as file:
            file.write(header(planned))
            for expected, shape in planned.items():
                given, tensor = next(tensors)
                assert given == expected
                assert (tensor.shape, tensor.dtype) == (shape.shape, shape.dtype), given
                _write_values(file, tensor)
            sync(file)
    if len(files) > 1:
        size = sum(tensor.nbytes for planned in files for tensor in planned.values())
        weight_map = {
            key: name for name, planned in zip(names, files, strict=True) for key in planned
        }
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def header(planned: Mapping[str, Tensor]) -> bytes:
    """Return the header of a file; the values follow in the same order, without gaps."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in planned.items():
        end = start + tensor.nbytes
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_values(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
