"""Weight gradients that wait are those of an undivided backward pass, to the bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.kernels.expert_rows import plan_rows
from moetron.moe.layers.experts import GroupedExperts
from moetron.moe.layers.scaled_experts import ScaledGroupedExperts
from moetron.moe.overlap.delayed_gradients import DelayedGradients
from moetron.moe.overlap.delayed_linear import (
    DelayedColumnParallelLinear,
    DelayedRowParallelLinear,
)
from tests.parallel.support.harness import model_parallel

EXPERTS, HIDDEN, TOKENS = 4, 32, 24
CONFIG = TransformerConfig(
    num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS,
    moe_ffn_hidden_size=32, moe_router_topk=2, add_bias_linear=False, gated_linear_unit=True,
    activation_func=torch.nn.functional.silu, bias_activation_fusion=False, bf16=True,
    params_dtype=torch.bfloat16,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _experts(kind: type[GroupedExperts], delays: bool) -> GroupedExperts:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    experts = kind(EXPERTS, CONFIG, pg_collection=groups)
    if delays:
        experts.delay(experts.weight1, experts.weight2)
    return experts


def _linear(kind: type[torch.nn.Module], bias: bool) -> Any:
    more: dict[str, Any] = (
        {"gather_output": False}
        if issubclass(kind, ColumnParallelLinear)
        else {"input_is_parallel": True}
    )
    init = CONFIG.init_method
    layer = kind(
        HIDDEN, 48, config=CONFIG, init_method=init, bias=bias, skip_bias_add=False, **more
    )
    if bias:
        torch.nn.init.normal_(layer.bias)
    return layer


BUILDERS: dict[str, Callable[[bool], Any]] = {
    "grouped": lambda delays: _experts(GroupedExperts, delays),
    "scaled": lambda delays: _experts(ScaledGroupedExperts, delays),
    "column": lambda delays: _linear(
        DelayedColumnParallelLinear if delays else ColumnParallelLinear, bias=False
    ),
    "column with bias": lambda delays: _linear(
        DelayedColumnParallelLinear if delays else ColumnParallelLinear, bias=True
    ),
    "row": lambda delays: _linear(
        DelayedRowParallelLinear if delays else RowParallelLinear, bias=False
    ),
}


def _pass(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Run forward and backward pass; return the gradient of ``x``."""
    x = x.clone().requires_grad_()
    if isinstance(module, GroupedExperts):
        torch.manual_seed(11)
        map_TE = torch.rand(TOKENS, EXPERTS).argsort(1) < 2
        out, _ = module(x.view(TOKENS, HIDDEN), plan_rows(map_TE, 2), torch.rand(TOKENS, EXPERTS))
    else:
        out, _ = module(x)
    torch.manual_seed(12)
    out.backward(torch.randn(out.shape).to(out.dtype))
    assert x.grad is not None
    return x.grad


def _inputs() -> torch.Tensor:
    return torch.randn(TOKENS // 2, 2, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", BUILDERS)
def test_gradients_are_those_of_an_undivided_pass(name: str) -> None:
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    torch.manual_seed(5)
    plain, x = BUILDERS[name](False), _inputs().bfloat16()
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    torch.manual_seed(5)
    delayed = BUILDERS[name](True)
    calls: list[str] = []
    weights = [each for each, p in delayed.named_parameters() if "weight" in each]
    for weight in weights:
        assert delayed.get_parameter(weight).skip_backward_post_hook
        delayed.register_wgrad_accumulation_and_reduce_hooks(lambda: calls.append("reduced"))
    assert torch.equal(_pass(delayed, x), _pass(plain, x))
    assert all(delayed.get_parameter(weight).grad is None for weight in weights)
    assert not calls
    delayed.backward_dw()
    assert calls == ["reduced"] * len(weights)
    for key, parameter in plain.named_parameters():
        found = delayed.get_parameter(key).grad
        assert found is not None and parameter.grad.abs().max() > 0
        assert torch.equal(found, parameter.grad), key
    delayed.backward_dw()  # nothing waits any more
    assert len(calls) == len(weights)
    assert not delayed.state_dict().keys() ^ plain.state_dict().keys()


def test_nothing_waits_unless_asked() -> None:
    plain = _experts(GroupedExperts, delays=False)
    _pass(plain, _inputs().bfloat16())
    assert plain.weight1.grad is not None and plain.weight2.grad is not None
    before = plain.weight1.grad.clone()
    plain.backward_dw()
    assert torch.equal(plain.weight1.grad, before)
    assert not hasattr(plain.weight1, "skip_backward_post_hook")


def test_passes_that_wait_together_add_up() -> None:
    class Module(DelayedGradients):
        pass

    weight = torch.nn.Parameter(torch.zeros(2))
    module = Module()
    module.delay(weight)
    for value in (1.0, 2.0):
        assert module.gradient(weight, lambda value=value: torch.full((2,), value)) is None
    module.backward_dw()
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 3.0]
