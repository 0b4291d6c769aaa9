"""When --cuda-graph-impl captures; Transformer Engine's part is a stand-in."""

import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import num_microbatches_calculator as calculator
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.transformer_layer import TransformerLayer

from moetron.common.errors import UserError
from moetron.moe.host import device, layer_graphs
from moetron.moe.host.layer_graphs import LayerGraphs
from tests.gpu.in_process import train
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
    names: Any = "config", ["chunk"], "optimizer"
    return LayerGraphs(settings, *names)


def test_captures_once_after_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"cuda_graph_impl": "transformer_engine", "cuda_graph_warmup_steps": 2}
    graphs = _graphs(monkeypatch, **chosen)
    for step in (1, 2):
        graphs.before_step(step, 4)
        assert not calls
    for step in (3, 4, 5):
        graphs.before_step(step, 4)
        assert calls == [(["chunk"], "config", 8, 2, ["optimizer"]), 4]
    graphs.close()
    graphs.close()
    assert calls[2:] == ["deleted"]


def test_nothing_is_captured_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = _graphs(monkeypatch)
    for step in range(1, 6):
        graphs.before_step(step, 4)
    graphs.close()
    assert not calls


def test_a_failed_capture_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Helper) -> None:
        raise torch.AcceleratorError("CUDA error: legacy stream\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(Helper, "create_cudagraphs", fail)
    chosen = {"cuda_graph_impl": "transformer_engine", "cuda_graph_warmup_steps": 1}
    graphs = _graphs(monkeypatch, **chosen)
    graphs.before_step(6, 4)
    with pytest.raises(UserError, match="before step 7 failed: CUDA error: legacy stream; use"):
        graphs.before_step(7, 4)
    graphs.close()  # nothing was captured
    assert "deleted" not in calls


SHAPE = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8,
    "moe_ffn_hidden_size": 16, "num_experts": 4, "moe_router_topk": 2, "vocab_size": 64,
    "micro_batch_size": 2, "global_batch_size": 4, "train_iters": 5, "lr_warmup_iters": 1,
    "bf16": True, "qk_layernorm": True, "device": "cpu",
}  # fmt: skip


def _replayed(
    layer: TransformerLayer,
    replays: list[tuple[int, bool]],
    *arguments: Any,
    is_first_microbatch: bool,
    **more: Any,
) -> Any:
    """Stand for a graph: run what was captured; only tensors that it had may come."""
    assert all(value is None or isinstance(value, torch.Tensor) for value in more.values())
    replays.append((layer.layer_number, layer.is_moe_layer))
    # megatron-core passes a mask of zeros, which Transformer Engine's causal attention ignores.
    assert not more["attention_mask"].any()
    rotary = more["rotary_pos_emb"]
    return layer._te_cuda_graph_capture(*arguments, attention_mask=None, rotary_pos_emb=rotary)


@pytest.mark.parametrize("scope", [["attn"], ["attn", "mlp"]], ids=" ".join)
def test_losses_with_graphs_are_those_without(
    monkeypatch: pytest.MonkeyPatch, scope: list[str]
) -> None:
    """Layers take megatron-core's way around captured parts, and a capture leaves no trace.

    Of the two layers the first is dense, so that with mlp its graph returns the layer's output.
    """
    shape = {**SHAPE, "first_k_dense_replace": 1, "ffn_hidden_size": 16}
    expected = train(make(**shape), 4)
    replays: list[tuple[int, bool]] = []
    captured: list[int] = []

    def capture(layers: Any, samples: Any, sample_kwargs: Any, **_: Any) -> list[Any]:
        for layer, sample, more in zip(layers, samples, sample_kwargs, strict=True):
            (output,) = layer(*sample, **more)  # as Transformer Engine warms up
            captured.append(len(layer._get_submodules_under_cudagraphs()))
            parameters = [p for p in layer.parameters() if p.requires_grad]
            torch.autograd.grad(output.sum(), [*sample, *parameters], allow_unused=True)
        return [partial(_replayed, layer, replays) for layer in layers]

    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(cuda_graphs, "HAVE_TE_GRAPHS", True)
    monkeypatch.setattr(cuda_graphs, "make_graphed_callables", capture, raising=False)
    for module in (cuda_graphs, sys.modules[TransformerLayer.__module__]):
        monkeypatch.setattr(module, "is_te_min_version", lambda *_: True)
    monkeypatch.setattr(device, "_check_again", lambda *_: None)  # a rule asks for a GPU
    graphs = {
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_warmup_steps": 2,
        "cuda_graph_scope": scope,
    }
    found = train(make(**shape, **graphs), 4)
    # Two micro-batches in each of the last two steps.
    assert replays == [(1, False), (2, True)] * 4
    dense, sparse = captured
    assert dense - sparse == 2 * ("mlp" in scope)  # a norm and an FFN
    for row, other in zip(found, expected, strict=True):
        for name in ("lm_loss", "grad_norm"):
            assert row[name] == other[name], name
