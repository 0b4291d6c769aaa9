"""Experts of FP8 tensor cores, by the reference of their products on a CPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.kernels.expert_rows import plan_rows
from moetron.moe.layers.experts import GroupedExperts
from moetron.moe.layers.scaled_experts import ScaledGroupedExperts, scaled_experts_fit
from tests.parallel.support.harness import model_parallel
from tests.unit.kernels.interpreter import rerun_interpreted

EXPERTS, HIDDEN, FFN, TOPK = 4, 64, 32, 2
GELU = {"gated_linear_unit": False, "activation_func": F.gelu}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


def _config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": EXPERTS,
        "moe_ffn_hidden_size": FFN,
        "moe_router_topk": TOPK,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": False,
    }
    return TransformerConfig(**{**values, **changes})


@pytest.fixture(scope="module", autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _experts(kind: type[GroupedExperts], **changes: Any) -> GroupedExperts:
    """Return experts whose weights are drawn from a fixed random state."""
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return kind(EXPERTS, _config(**changes), pg_collection=groups)


def _map(tokens: int, used: int = EXPERTS) -> torch.Tensor:
    order = torch.rand(tokens, used).argsort(1)
    return F.pad(order < TOPK, (0, EXPERTS - used))


def _run(experts: GroupedExperts, map_TE: torch.Tensor, sort: bool) -> list[torch.Tensor]:
    """Return output and gradients of tokens, weights of tokens, and parameters."""
    generator = torch.Generator().manual_seed(7)
    shape = (len(map_TE), HIDDEN)
    x = torch.randn(shape, generator=generator).to(experts.weight1.dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(x.dtype)
    probs = torch.rand(map_TE.shape, generator=generator).requires_grad_()
    plan = plan_rows(map_TE, TOPK)
    if sort:  # as a dispatcher that exchanges tokens
        source_R = map_TE.t().nonzero()[:, 1]
        out_R, _ = experts(x[source_R], map_TE.sum(0), probs.t()[map_TE.t()])
        out = torch.zeros(shape, dtype=x.dtype).index_add(0, source_R, out_R)
    else:
        out, _ = experts(x, plan, probs)
    experts.zero_grad()
    out.backward(grad)
    return [out.detach(), x.grad, probs.grad, experts.weight1.grad, experts.weight2.grad]


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).float().norm() / wanted.float().norm())


@pytest.mark.parametrize("sort", [False, True], ids=["local", "exchanged"])
@pytest.mark.parametrize("used", [EXPERTS, 2], ids=["all used", "two without rows"])
@pytest.mark.parametrize("changes", [{}, GELU, BF16], ids=["swiglu", "gelu", "bf16"])
def test_is_near_experts_without_fp8(changes: dict[str, Any], used: int, sort: bool) -> None:
    """Within the error of products whose operands have three bits of mantissa."""
    torch.manual_seed(3)
    map_TE = _map(60, used)
    scaled = _run(_experts(ScaledGroupedExperts, **changes), map_TE, sort)
    plain = _run(_experts(GroupedExperts, **changes), map_TE, sort)
    for mine, other in zip(scaled, plain, strict=True):
        assert mine.dtype == other.dtype
        assert 0.01 < _error(mine, other) < 0.08
    for gradient in scaled[3:]:
        assert gradient.flatten(1).ne(0).any(1).tolist() == [e < used for e in range(EXPERTS)]


def test_rows_are_the_same_with_and_without_an_exchange() -> None:
    map_TE = _map(50)
    experts = _experts(ScaledGroupedExperts)
    for mine, other in zip(
        _run(experts, map_TE, sort=False), _run(experts, map_TE, sort=True), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("sort", [False, True], ids=["local", "exchanged"])
@pytest.mark.parametrize("tokens", [0, 5], ids=["no tokens", "no rows"])
def test_nothing_to_do(tokens: int, sort: bool) -> None:
    map_TE = torch.zeros(tokens, EXPERTS, dtype=torch.bool)
    found = _run(_experts(ScaledGroupedExperts), map_TE, sort)
    assert all(tensor.eq(0).all() for tensor in found)


def test_a_written_weight_is_quantised_again() -> None:
    map_TE = _map(20)
    experts, fresh = _experts(ScaledGroupedExperts), _experts(ScaledGroupedExperts)
    _run(experts, map_TE, sort=False)
    torch.optim.SGD(experts.parameters(), lr=0.1).step()
    fresh.load_state_dict(experts.state_dict())
    for mine, other in zip(
        _run(experts, map_TE, sort=False), _run(fresh, map_TE, sort=False), strict=True
    ):
        assert torch.equal(mine, other)
    experts.load_state_dict(_experts(ScaledGroupedExperts).state_dict())
    assert not torch.equal(_run(experts, map_TE, sort=False)[0], other)


def test_a_checkpoint_is_that_of_grouped_experts() -> None:
    scaled, plain = _experts(ScaledGroupedExperts), _experts(GroupedExperts)
    _run(scaled, _map(20), sort=False)  # makes copies of the weights
    assert scaled.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(scaled.state_dict()[name], value)
    mine, other = (experts.sharded_state_dict("a.") for experts in (scaled, plain))
    assert mine.keys() == other.keys()
    assert {value.key for value in mine.values()} == {value.key for value in other.values()}


@pytest.mark.parametrize(
    ("changes", "ranks", "fit"),
    [({}, 1, True), ({}, 2, True), ({}, 4, False), ({"hidden_size": 72}, 1, False)],
)
def test_widths_must_be_multiples_of_16(changes: dict[str, Any], ranks: int, fit: bool) -> None:
    assert scaled_experts_fit(_config(**changes), ranks) == fit


def test_in_the_interpreter() -> None:
    rerun_interpreted(__file__)
