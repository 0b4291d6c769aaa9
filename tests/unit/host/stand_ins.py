"""Simulated machines: drivers, GPUs and installations of Transformer Engine."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils

from moetron.moe.config import machine
from moetron.moe.host import usable

TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)"
BROKEN = ("ImportError", "RuntimeError", "OSError")


def write_transformer_engine(folder: Path, kind: str, part: bool = False) -> None:
    """Create a package on disk whose import raises ``kind``; "fine": no error.

    ``part``: the package imports, its part for torch raises.
    """
    package = folder / "transformer_engine"
    package.mkdir(parents=True)
    marker = f"with open({str(folder / 'executed')!r}, 'a') as file:\n    file.write('x')\n"
    text = "" if kind == "fine" else f"raise {kind}('libcudnn.so.9: no such file')\n"
    (package / "__init__.py").write_text(marker + ("" if part else text), encoding="utf-8")
    (package / "pytorch.py").write_text(text, encoding="utf-8")


def was_executed(folder: Path) -> bool:
    """Return whether the package ran."""
    return (folder / "executed").exists()


def pretend_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give megatron-core names of Transformer Engine's fused kernels, which fail if called."""

    def kernel(*_: Any, **__: Any) -> None:
        raise AssertionError("a stand-in for a GPU kernel was called")

    monkeypatch.setattr(moe_utils, "HAVE_TE", True)
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(rope_utils, name, kernel)
    for name in (
        "fused_permute",
        "fused_permute_with_probs",
        "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs",
        "fused_unpermute",
        "fused_topk_with_score_function",
        "fused_compute_score_for_moe_aux_loss",
    ):
        monkeypatch.setattr(moe_utils, name, kernel, raising=False)


def pretend(
    monkeypatch: pytest.MonkeyPatch, folder: Path, cuda: str, te: str, part: bool = False
) -> None:
    """A machine.

    Args:
        monkeypatch: undoes it.
        folder: empty, for what is on the disk.
        cuda: "no driver", "too old", "cpu build", "hidden" or "gpu" (two of them).
        te: "absent", "fine", or the name of the error that its import raises.
        part: see `write_transformer_engine`.
    """
    monkeypatch.setattr(machine, "_PROC", folder / "version")
    monkeypatch.setattr(machine, "_DEVICE_FOLDER", folder)
    monkeypatch.setattr(machine, "transformer_engine_is_installed", lambda: te != "absent")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    folder.mkdir(parents=True, exist_ok=True)
    if cuda != "no driver":
        (folder / "version").touch()
    if cuda == "hidden":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def is_available() -> bool:
        if cuda == "too old":
            warnings.warn(TOO_OLD, stacklevel=1)
        return cuda == "gpu"

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", None if cuda == "cpu build" else "13.0")
    monkeypatch.setattr(usable, "cuda_fault", usable.cuda_fault.__wrapped__)
    if te != "absent":
        write_transformer_engine(folder, te, part)
        monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    others = [finder for finder in sys.meta_path if type(finder) is not usable._Guard]
    monkeypatch.setattr(sys, "meta_path", others)
    usable.guard_imports()
