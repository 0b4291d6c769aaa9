"""Tensors are read from the bytes of a checkpoint, whole, however torch stored them."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan

from moetron.common.errors import UserError
from moetron.moe.checkpoint.index_reader import read_index
from moetron.moe.checkpoint.stored_tensor import FilePart, find_tensor
from moetron.moe.checkpoint.tensor_reader import IndexedReader
from tests.unit.checkpoint.test_unpickling import NAME, edit_index

MATRIX = torch.arange(12.0).view(3, 4)
PLAIN = {
    **{str(dtype): MATRIX.to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)},
    **{str(dtype): MATRIX.to(dtype) for dtype in (torch.int64, torch.uint8, torch.bool)},
    "one number": torch.tensor(3),
    "no elements": torch.zeros(0, 4),
}
OTHER = {
    "transposed": MATRIX.t(),
    "part of its storage": MATRIX[1:],
    "float8": MATRIX.to(torch.float8_e4m3fn),
    "parameter": torch.nn.Parameter(MATRIX),
}


def _stored(tensor: torch.Tensor) -> bytes:
    archive = io.BytesIO()
    torch.save(tensor, archive)
    return archive.getvalue()


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_tensors_are_found(kind: str) -> None:
    data = _stored(PLAIN[kind])
    found = find_tensor(io.BytesIO(data))
    assert found is not None
    end = found.offset + PLAIN[kind].nbytes
    expected = PLAIN[kind].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert (found.dtype, found.shape) == (PLAIN[kind].dtype, tuple(PLAIN[kind].shape))
    assert data[found.offset : end] == expected


@pytest.mark.parametrize("kind", OTHER)
def test_others_are_left_to_torch(kind: str) -> None:
    assert find_tensor(io.BytesIO(_stored(OTHER[kind]))) is None


def test_a_compressed_archive_is_left_to_torch() -> None:
    copy = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(_stored(MATRIX)))
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert find_tensor(copy) is None


def test_a_tensor_that_claims_more_bytes_than_its_archive_has_is_left_to_torch() -> None:
    copy, big = io.BytesIO(), zipfile.ZipFile(io.BytesIO(_stored(torch.zeros(1000))))
    with zipfile.ZipFile(copy, "w") as target:
        for name in ("archive/data.pkl", "archive/byteorder"):
            target.writestr(name, big.read(name))
        target.writestr("archive/data/0", b"few")
        target.getinfo("archive/data/0").file_size = 4000
    assert find_tensor(copy) is None


def test_a_number_of_the_other_byte_order_is_left_to_torch() -> None:
    data = _stored(MATRIX)
    assert find_tensor(io.BytesIO(data)) is not None
    assert find_tensor(io.BytesIO(data.replace(b"little", b"big\0\0\0"))) is None


@pytest.mark.parametrize("kind", [*PLAIN, *OTHER])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_every_kind_is_loaded(tmp_path: Path, kind: str, dtype: torch.dtype | None) -> None:
    tensor = {**PLAIN, **OTHER}[kind].detach()
    dcp.save({NAME: tensor}, checkpoint_id=tmp_path / "step", no_dist=True)
    target = torch.ones(tensor.shape, dtype=dtype or tensor.dtype)
    dcp.load({NAME: target}, storage_reader=IndexedReader(tmp_path / "step"), no_dist=True)
    assert torch.equal(target, tensor.to(target.dtype))


def test_a_part_of_a_file_ends_where_it_should(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with (tmp_path / "file").open("rb") as file:
        part = FilePart(file.fileno(), 2, 5)
        assert part.read() == b"23456"
        assert part.seek(-2, io.SEEK_END) == 3
        assert (part.read(9), part.read(9)) == (b"56", b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a checkpoint of one tensor."""
    step = tmp_path / "step_0000001"
    dcp.save({NAME: torch.arange(6.0).view(2, 3)}, checkpoint_id=step, no_dist=True)
    return step


def test_overlapping_parts_are_refused(folder: Path) -> None:
    """Their elements add up, but nothing stores the others."""

    def repeat(index: Any) -> None:
        index.state_dict_metadata[NAME].chunks *= 2

    edit_index(folder, repeat)
    with pytest.raises(UserError, match="overlap, so that others of it may be missing"):
        read_index(folder)


def test_a_plan_with_a_gap_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DefaultLoadPlanner, "create_local_plan", lambda self: LoadPlan([]))
    tensor = torch.zeros(2, 3)
    with pytest.raises(CheckpointException, match="0 of 6 elements would be read"):
        dcp.load({NAME: tensor}, storage_reader=IndexedReader(folder), no_dist=True)


def test_a_file_that_ends_early_is_found(folder: Path) -> None:
    reader = IndexedReader(folder)
    [file] = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(CheckpointException):
        dcp.load({NAME: torch.zeros(2, 3)}, storage_reader=reader, no_dist=True)
