"""Shards and index as the safetensors library reads them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moetron.common.errors import UserError
from moetron.moe.convert.safetensors_folder import INDEX, SINGLE, TensorFolder, shards, write_folder

TENSORS = {
    "a": torch.randn(3, 2),
    "b": torch.randn(4).bfloat16(),
    "c": torch.randn(2, 2, 2),
    "d": torch.randn(5).half(),
}


def test_the_library_reads_one_file(tmp_path: Path) -> None:
    write_folder(tmp_path, [TENSORS], iter(TENSORS.items()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_shards_are_full_and_indexed(tmp_path: Path) -> None:
    """Tensors of 24, 8, 32 and 10 bytes in files of at most 40."""
    files = shards(TENSORS, 40)
    assert [list(file) for file in files] == [["a", "b"], ["c"], ["d"]]
    write_folder(tmp_path, files, iter(TENSORS.items()))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 74
    assert index["weight_map"]["c"] == "model-00002-of-00003.safetensors"
    for name, tensor in TENSORS.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    folder = TensorFolder(tmp_path)
    assert folder.names() == list(TENSORS)
    assert folder.empty("b").dtype == torch.bfloat16
    assert torch.equal(folder.read("d"), TENSORS["d"])


def test_a_tensor_larger_than_a_file_gets_its_own() -> None:
    assert [list(file) for file in shards(TENSORS, 1)] == [["a"], ["b"], ["c"], ["d"]]


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pickled weights .* are not supported"):
        TensorFolder(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(UserError, match=r"'../other.safetensors' leads out of the folder"):
        TensorFolder(tmp_path).read("a")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    with pytest.raises(UserError, match=r"other.safetensors is missing"):
        TensorFolder(tmp_path).read("a")


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match=rf"{INDEX}: damaged"):
        TensorFolder(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=rf"{SINGLE}: damaged"):
        TensorFolder(tmp_path)


def test_links_stay_in_the_folder_or_in_the_hubs_cache(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    write_folder(outside, [TENSORS], iter(TENSORS.items()))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / SINGLE).symlink_to(outside / SINGLE)
    with pytest.raises(UserError, match="a link that leads out of the folder"):
        TensorFolder(folder)
    cache = tmp_path / "models--a--b"
    (cache / "snapshots" / "1").mkdir(parents=True)
    outside.rename(cache / "blobs")
    (cache / "snapshots" / "1" / SINGLE).symlink_to(f"../../blobs/{SINGLE}")
    assert TensorFolder(cache / "snapshots" / "1").names() == list(TENSORS)
