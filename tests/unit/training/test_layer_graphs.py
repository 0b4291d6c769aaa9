"""When --cuda-graph-impl captures; Transformer Engine's part is a stand-in."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from megatron.core import num_microbatches_calculator as calculator

from moetron.moe.training import layer_graphs
from moetron.moe.training.layer_graphs import LayerGraphs
from tests.unit.config.config_cases import make

calls: list[Any] = []


class Helper:
    """Stand-in for TECudaGraphHelper."""

    def __init__(self, *arguments: Any) -> None:
        calls.append(arguments)

    def create_cudagraphs(self) -> None:
        calls.append(calculator.get_num_microbatches())

    def delete_cuda_graphs(self) -> None:
        calls.append("deleted")


def _graphs(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> LayerGraphs:
    calls.clear()
    monkeypatch.setattr(layer_graphs, "TECudaGraphHelper", Helper)
    settings = make(micro_batch_size=2, global_batch_size=8, seq_length=8, **changes)
    trainer = SimpleNamespace(settings=settings, chunks=["chunk"], config="config", optimizer="o")
    return LayerGraphs(cast("Any", trainer))


def test_captures_once_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"cuda_graph_impl": "transformer_engine", "cuda_graph_warmup_steps": 2}
    graphs = _graphs(monkeypatch, **chosen)
    for _ in range(2):
        graphs.before_step(4)
        assert not calls
    for _ in range(3):
        graphs.before_step(4)
        assert calls == [(["chunk"], "config", 8, 2, ["o"]), 4]
    graphs.close()
    graphs.close()
    assert calls[2:] == ["deleted"]


def test_nothing_is_captured_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = _graphs(monkeypatch)
    for _ in range(5):
        graphs.before_step(4)
    graphs.close()
    assert not calls
