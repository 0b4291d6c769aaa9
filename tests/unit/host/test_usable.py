"""Imports of Transformer Engine succeed only where it works; otherwise ImportError."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetron.moe.host import usable
from tests.unit.host.stand_ins import BROKEN, TOO_OLD, pretend, was_executed
from tests.unit.host.stand_ins import write_transformer_engine as write

ROOT = Path(__file__).parents[3]


def test_reasons_for_unusable_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reasons = {
        "no driver": ("there is no NVIDIA driver", False),
        "hidden": ("CUDA_VISIBLE_DEVICES= hides every GPU", False),
        "too old": (f"{TOO_OLD} (driver found: {tmp_path / 'too old' / 'version'})", True),
        "cpu build": (f"torch {torch.__version__} is built without CUDA (driver found: ", True),
    }
    for cuda, (reason, is_broken) in reasons.items():
        pretend(monkeypatch, tmp_path / cuda, cuda, "absent")
        fault = usable.cuda_fault()
        assert fault is not None and fault.reason.startswith(reason)
        assert fault.is_broken is is_broken
        monkeypatch.undo()
    pretend(monkeypatch, tmp_path / "gpu", "gpu", "absent")
    assert usable.cuda_fault() is None


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("error", BROKEN)
def test_a_broken_package_is_tried_once_and_cleaned_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str, part: bool
) -> None:
    pretend(monkeypatch, tmp_path, "gpu", error, part)
    reason = f"its import fails: {error}: libcudnn.so.9: no such file"
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine"):
        with pytest.raises(ImportError, match=f"transformer_engine cannot be used: {reason}"):
            importlib.import_module(name)
        assert not [name for name in sys.modules if name.startswith("transformer_engine")]
    assert usable.transformer_engine_fault() == reason
    assert (tmp_path / "executed").read_text() == "x"


@pytest.mark.parametrize("cuda", ["no driver", "hidden", "too old"])
def test_without_a_gpu_the_package_does_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str
) -> None:
    pretend(monkeypatch, tmp_path, cuda, "fine")
    assert importlib.util.find_spec("transformer_engine") is not None
    with pytest.raises(ImportError, match="it needs a GPU"):
        importlib.import_module("transformer_engine")
    assert not was_executed(tmp_path)


def test_a_working_package_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, "gpu", "fine")
    module = importlib.import_module("transformer_engine")
    assert module.__file__ == str(tmp_path / "transformer_engine" / "__init__.py")
    assert usable.transformer_engine_fault() is None
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name)


def test_an_absent_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, "gpu", "absent")
    assert usable.transformer_engine_fault() == "it is not installed"


def test_one_guard_for_a_process() -> None:
    usable.guard_imports()
    usable.guard_imports()
    assert len([finder for finder in sys.meta_path if isinstance(finder, usable._Guard)]) == 1


def _import_everything(folder: Path, before: str) -> str:
    """Import the model and training in a new process; return megatron-core's view of TE."""
    program = (
        f"{before}\nimport moetron.moe.training.build_trainer\n"
        "from megatron.core.transformer.moe import moe_utils\n"
        "from megatron.core.models.gpt import gpt_layer_specs\n"
        "print(moe_utils.HAVE_TE, gpt_layer_specs.HAVE_TE)"
    )
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("error", "part"), [("RuntimeError", False), ("OSError", True)])
def test_megatron_core_imports_beside_a_broken_package(
    tmp_path: Path, error: str, part: bool
) -> None:
    write(tmp_path, error, part)
    gpu = "import torch\ntorch.cuda.is_available = lambda: True"
    assert _import_everything(tmp_path, gpu) == "False False"
    assert was_executed(tmp_path)


def test_megatron_core_imports_beside_a_package_that_needs_a_gpu(tmp_path: Path) -> None:
    write(tmp_path, "RuntimeError")
    assert _import_everything(tmp_path, "") == "False False"
    assert not was_executed(tmp_path)
