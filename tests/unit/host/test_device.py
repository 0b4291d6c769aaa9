from pathlib import Path

import pytest
import torch

from moetron.common.errors import UserError
from moetron.moe.host import device


def test_auto_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.resolve_device("auto") == device.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="no CUDA device"):
        device.resolve_device("cuda")
    assert not device.has_transformer_engine()


def test_auto_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.resolve_device("auto") == device.resolve_device("cuda") == torch.device("cuda:3")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        device.resolve_device("cpu")


def test_backends() -> None:
    assert device.backend_for(torch.device("cpu")) == "gloo"
    assert device.backend_for(torch.device("cuda:0")) == "nccl"


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError])
def test_a_broken_transformer_engine_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[Exception]
) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    broken = f"raise {error.__name__}('cudnn shared object not found')"
    (package / "__init__.py").write_text(broken, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not device.has_transformer_engine()
