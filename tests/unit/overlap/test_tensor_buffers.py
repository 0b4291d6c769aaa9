"""Buffers of --tp-comm-overlap; Transformer Engine, which allocates them on GPUs, is a stand-in."""

import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moetron.moe.config import bridge
from moetron.moe.overlap.tensor_buffers import communication_buffers
from tests.unit.config.config_cases import make
from tests.unit.host.stand_ins import pretend_kernels


class Kinds(Enum):
    """Stand-in for UserBufferQuantizationMode."""

    NONE = "none"
    FP8 = "fp8"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the calls of Transformer Engine."""
    found: list[Any] = []
    base = ModuleType("base")
    base.UserBufferQuantizationMode = Kinds  # type: ignore[attr-defined]
    base.initialize_ub = lambda **options: found.append(options)  # type: ignore[attr-defined]
    base.destroy_ub = lambda: found.append("freed")  # type: ignore[attr-defined]
    module = ModuleType("module")
    module.base = base  # type: ignore[attr-defined]
    for name, content in (("", None), (".pytorch", None), (".pytorch.module", module)):
        path = f"transformer_engine{name}"
        monkeypatch.setitem(sys.modules, path, content or ModuleType(path))
    return found


TENSOR: dict[str, Any] = {
    "bf16": True,
    "seq_length": 32,
    "micro_batch_size": 2,
    "hidden_size": 64,
    "tensor_model_parallel_size": 4,
    "context_parallel_size": 2,
    "tp_comm_overlap": True,
}
EXPECTED = {
    "shape": [32, 64],
    "tp_size": 4,
    "quantization_modes": [Kinds.NONE],
    "ub_cfgs": {},
    "bootstrap_backend": "nccl",
}


def test_nothing_is_allocated_by_default(calls: list[Any]) -> None:
    with communication_buffers(make()):
        pass
    assert not calls


def test_buffers_live_as_long_as_the_groups(calls: list[Any]) -> None:
    with communication_buffers(make(**TENSOR)):
        assert calls == [EXPECTED]
    assert calls[1:] == ["freed"]
    with pytest.raises(KeyError), communication_buffers(make(**TENSOR)):
        raise KeyError
    assert calls[3:] == ["freed"]


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, [Kinds.FP8]),
        ({"first_last_layers_bf16": True}, [Kinds.FP8, Kinds.NONE]),
    ],
)
def test_fp8_layers_have_buffers_of_their_own(
    calls: list[Any], changes: dict[str, Any], kinds: list[Kinds]
) -> None:
    with communication_buffers(make(**TENSOR, fp8_format="hybrid", **changes)):
        assert calls[0]["quantization_modes"] == kinds


def test_options_come_from_a_file(calls: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "buffers.yaml"
    file.write_text("proj_fprop: {method: ring_exchange, num_sm: 1}\n", encoding="utf-8")
    more = {"tp_comm_overlap_cfg": str(file), "tp_comm_bootstrap_backend": "gloo"}
    with communication_buffers(make(**TENSOR, **more)):
        assert calls[0]["ub_cfgs"] == {"proj_fprop": {"method": "ring_exchange", "num_sm": 1}}
        assert calls[0]["bootstrap_backend"] == "gloo"


def test_flags_reach_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_kernels(monkeypatch)
    off = {"tp_comm_overlap_ag": False, "tp_comm_bulk_wgrad": False}
    config = bridge.transformer_config(
        make(**TENSOR, **off, tp_comm_overlap_rs_dgrad=True), transformer_engine=True
    )
    assert config.tp_comm_overlap and config.tp_comm_overlap_rs and config.tp_comm_bulk_dgrad
    assert config.tp_comm_overlap_rs_dgrad and config.sequence_parallel
    assert not config.tp_comm_overlap_ag and not config.tp_comm_bulk_wgrad
    assert not bridge.transformer_config(make()).tp_comm_overlap
