"""Folders of HuggingFace's: sharded safetensors with an index, read and written tensor by tensor.

The safetensors library writes a file from tensors that are all in memory. Here the header, which is
all that comes before the values, is written first and each tensor after it as it is made:
https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from moetron.common.errors import UserError
from moetron.common.files import sync, write_text

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TensorFolder:
    """The tensors of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = self._read_index()

    def _read_index(self) -> dict[str, str]:
        if (self._folder / INDEX).is_file():
            content = json.loads((self._folder / INDEX).read_text(encoding="utf-8"))
            return dict(content["weight_map"])
        if (self._folder / WHOLE).is_file():
            with safe_open(self._folder / WHOLE, "pt") as file:
                return dict.fromkeys(file.keys(), WHOLE)
        raise UserError(
            f"{self._folder}: neither {WHOLE} nor {INDEX} is there; weights as pickles (.bin) are "
            "not read: save them with safetensors"
        )

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def empty(self, name: str) -> Tensor:
        """A meta tensor of that shape and type."""
        with self._open(name) as file:
            part = file.get_slice(name)
            dtypes = {text: dtype for dtype, text in DTYPES.items()}
            if part.get_dtype() not in dtypes:
                raise UserError(f"{self._folder}: {name} is {part.get_dtype()}, not a float type")
            return torch.empty(part.get_shape(), dtype=dtypes[part.get_dtype()], device="meta")

    def read(self, name: str) -> Tensor:
        """The tensor."""
        with self._open(name) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def _open(self, name: str) -> safe_open:
        path = self._folder / self._file_of[name]
        if path.parent != self._folder or not path.is_file():
            raise UserError(f"{self._folder}: {self._file_of[name]} is missing")
        return safe_open(path, "pt")


def shards(tensors: Mapping[str, Tensor], largest: int) -> list[dict[str, Tensor]]:
    """Cut tensors (meta ones will do), in their order, into files of at most ``largest`` bytes."""
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
        folder: exists.
        files: name -> meta tensor for each file (`shards`).
        tensors: name and values, in the same order.
    """
    names = [WHOLE]
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
    """What a file begins with; the values follow in this order, without gaps."""
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
