"""Nothing that a checkpoint's pickles name is executed."""

import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from moetron.common.errors import UserError
from moetron.moe.checkpoint.index_reader import METADATA, read_index
from moetron.moe.checkpoint.tensor_reader import IndexedReader
from moetron.moe.checkpoint.unpickling import check_layer_state
from tests.unit.checkpoint.hostile_pickles import (
    hostile,
    hostile_layer_states,
    pwned,
    registered_extension,
)

HOSTILE = hostile()
LAYER_STATES = hostile_layer_states()
NAME = "decoder.weight"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a checkpoint of one tensor, in the current folder."""
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "step_0000001"
    dcp.save({NAME: torch.arange(6.0).view(2, 3)}, checkpoint_id=step, no_dist=True)
    return step


def test_there_are_enough_kinds() -> None:
    assert len(HOSTILE) + len(LAYER_STATES) >= 30


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_index_runs_nothing(folder: Path, kind: str) -> None:
    (folder / METADATA).write_bytes(HOSTILE[kind])
    with pytest.raises(UserError, match="damaged, or not a checkpoint's index"):
        read_index(folder)
    assert not pwned(folder.parent)


@pytest.mark.parametrize(
    "kind", ["reduce os.system", "text protocol", "inst opcode", "extension registry", "memo"]
)
def test_python_itself_would_run_them(folder: Path, kind: str) -> None:
    """The pickles do run code in Python itself."""
    with registered_extension():
        pickle.loads(HOSTILE[kind])  # noqa: S301 - that it runs is the point
    assert pwned(folder.parent)


def test_a_number_that_stands_for_a_function_is_refused(folder: Path) -> None:
    """Also after Python has resolved it once, when it asks no reader again."""
    (folder / METADATA).write_bytes(HOSTILE["extension registry"])
    with registered_extension():
        pickle.loads(HOSTILE["extension registry"])  # noqa: S301
        (folder.parent / "pwned").unlink()
        with pytest.raises(UserError, match="pickle extensions"):
            read_index(folder)
    assert not pwned(folder.parent)


@pytest.mark.parametrize("kind", LAYER_STATES)
def test_the_state_of_a_layer_runs_nothing(folder: Path, kind: str) -> None:
    with pytest.raises(Exception, match=r"refers to|not a dictionary|[Ww]eights.only"):
        check_layer_state(LAYER_STATES[kind])
    assert not pwned(folder.parent)


_RECIPES = "transformer_engine.common.recipe"
_MEGATRON = "megatron.core.extensions.transformer_engine"


@pytest.mark.parametrize(
    ("module", "recipe"),
    [
        (_RECIPES, "Float8CurrentScaling"),
        (_RECIPES, "Float8BlockScaling"),
        (_MEGATRON, "TEDelayedScaling"),
    ],
)
def test_the_fp8_state_of_a_layer_is_read(
    monkeypatch: pytest.MonkeyPatch, module: str, recipe: str
) -> None:
    """As Transformer Engine's layers pickle it, with stand-ins for the two packages."""
    for name in ("transformer_engine", "transformer_engine.common", _RECIPES, _MEGATRON):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def stand_in(place: str, name: str, base: type) -> Any:
        made = type(name, (base,), {"__module__": place})
        setattr(sys.modules[place], name, made)
        return made

    held = stand_in(module, recipe, object)()
    held.fp8_format = stand_in(_RECIPES, "_FormatHelper", tuple)((448, 57344))
    state = {"recipe": held, "scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}
    check_layer_state(pickle.dumps(state))


def edit_index(folder: Path, change: Callable[[Metadata], Any]) -> None:
    index = pickle.loads((folder / METADATA).read_bytes())  # noqa: S301 - torch wrote it just now
    change(index)
    (folder / METADATA).write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("name", [NAME, "optimizer.step", "rng.torch", "x._extra_state"])
def test_an_object_in_place_of_a_tensor_is_rejected(folder: Path, name: str) -> None:
    edit_index(folder, lambda i: i.state_dict_metadata.update({name: BytesStorageMetadata()}))
    with pytest.raises(UserError, match=f"{name} is an object"):
        read_index(folder)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/hostname", "sub/../../secret", "link", "absent", "", ".", "a\0b"]
)
def test_no_file_outside_the_folder_is_opened(folder: Path, path: str) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / "link").symlink_to(folder.parent / "secret")

    def lead_away(index: Metadata) -> None:
        for info in index.storage_data.values():
            info.relative_path = path

    edit_index(folder, lead_away)
    with pytest.raises(UserError, match="no file of the checkpoint"):
        read_index(folder)


def _set(part: str, value: Any) -> Callable[[Metadata], None]:
    def change(index: Metadata) -> None:
        entry = index.state_dict_metadata[NAME]
        if part == "offset":
            for info in index.storage_data.values():
                info.offset = value
        elif part == "chunk":
            object.__setattr__(entry.chunks[0], "sizes", value)
        else:
            setattr(entry, part, value)

    return change


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("size", torch.Size([1] * 17)),
        ("size", (2, 3)),
        ("size", None),
        ("chunk", torch.Size([2, 4])),
        ("chunk", torch.Size([2])),
        ("offset", -1),
        ("offset", 1 << 80),
        ("offset", 1.5),
        ("properties", None),
        ("chunks", {}),
    ],
)
def test_values_of_other_types_are_rejected(folder: Path, part: str, value: Any) -> None:
    edit_index(folder, _set(part, value))
    with pytest.raises(UserError, match="damaged, or not a checkpoint's index"):
        read_index(folder)


def test_an_index_of_torch_is_read_back(folder: Path) -> None:
    tensor = torch.zeros(2, 3)
    dcp.load({NAME: tensor}, storage_reader=IndexedReader(folder), no_dist=True)
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3))
