"""Switches and environment of --deterministic-mode."""

import os

import pytest
import torch

from moetron.moe.config.rules.performance import DETERMINISTIC_ENVIRONMENT
from moetron.moe.host.determinism import deterministic


@pytest.fixture(autouse=True)
def _gpu_without_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in DETERMINISTIC_ENVIRONMENT:
        monkeypatch.setenv(name, "")  # restored afterwards, also if the code under test sets it
        monkeypatch.delenv(name)


def _switches() -> tuple[bool, bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_all_switches_are_set_and_restored() -> None:
    before = _switches()
    with pytest.raises(RuntimeError, match="inside"), deterministic(True):
        assert _switches() == (True, True, False, False)
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise RuntimeError("inside")
    assert _switches() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


def test_given_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    with deterministic(True):
        assert os.environ["NCCL_ALGO"] == "Tree"


@pytest.mark.parametrize("gpu", [True, False])
def test_nothing_without_the_flag_or_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = _switches()
    with deterministic(not gpu):
        assert _switches() == before
    assert not DETERMINISTIC_ENVIRONMENT.keys() & os.environ.keys()
