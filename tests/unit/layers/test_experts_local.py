"""Experts that move their own rows, against a loop over tokens in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.kernels.availability import is_interpreted
from moetron.moe.kernels.expert_rows import ExpertRows, plan_rows
from moetron.moe.layers.expert_variants import SeparateExperts
from moetron.moe.layers.experts import GroupedExperts
from tests.parallel.support.harness import model_parallel
from tests.unit.kernels.interpreter import rerun_interpreted

HIDDEN, FFN = 16, 8
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "geglu": {"activation_func": F.gelu},
    "gelu": {"gated_linear_unit": False, "activation_func": F.gelu},
    "relu": {"gated_linear_unit": False, "activation_func": F.relu},
    "softplus": {"gated_linear_unit": False, "activation_func": F.softplus},
}
TRIED = ["swiglu"] if is_interpreted() else list(KINDS)  # the interpreter is slow
CASES = [  # tokens, experts, topk, fraction of choices dropped
    (11, 4, 2, 0.0),
    (9, 8, 8, 0.0),
    (13, 6, 3, 0.5),
    (5, 4, 1, 0.0),
    (7, 4, 2, 1.0),
    (0, 4, 2, 0.0),
]


@pytest.fixture(scope="module", autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _experts(kind: type[GroupedExperts], experts: int, topk: int, **changes: Any) -> GroupedExperts:
    values: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": FFN,
        "moe_router_topk": topk,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": False,
        "init_method_std": 0.3,
        "moe_router_pre_softmax": True,
    }
    config = TransformerConfig(**{**values, **changes})
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return kind(experts, config, pg_collection=groups)


def _inputs(case: tuple[int, int, int, float], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return tokens, weights, the map, and a gradient of the output."""
    tokens, experts, topk, dropped = case
    torch.manual_seed(hash(case))
    chosen = torch.rand(tokens, experts).argsort(1) < topk
    map_TE = chosen & (torch.rand(tokens, experts) >= dropped)
    if experts > topk:
        map_TE[:, 1] = False  # an expert without tokens
    x, grad = torch.randn(2, tokens, HIDDEN).to(dtype)
    return [x, torch.rand(tokens, experts) * map_TE, map_TE, grad]


@contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN, which shows where rows of nobody are read."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _loop(experts: GroupedExperts, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return output and gradients (tokens, weights, both matrices) of a dense loop in float64."""
    x, probs, map_TE, grad = inputs
    leaves = [
        leaf.detach().double().requires_grad_()
        for leaf in (x, probs, experts.weight1, experts.weight2)
    ]
    x, probs, weight1, weight2 = leaves
    out = torch.zeros_like(x)
    for token, expert in map_TE.nonzero().tolist():
        hidden = weight1[expert] @ x[token]
        inner = experts.activation.inner(hidden.unsqueeze(0))[0]
        part = weight2[expert] @ (inner * probs[token, expert])
        out = out.index_add(0, torch.tensor([token]), part.unsqueeze(0))
    if not out.requires_grad:
        return [out, *(torch.zeros_like(leaf) for leaf in leaves)]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def _run(
    experts: GroupedExperts, inputs: list[torch.Tensor], rows: ExpertRows
) -> list[torch.Tensor]:
    x, probs = (leaf.clone().requires_grad_() for leaf in inputs[:2])
    with _nan_in_new_memory():
        out, bias = experts(x, rows, probs)
        out.backward(inputs[3])
    assert bias is None and out.dtype == x.dtype
    weights = (experts.weight1, experts.weight2)
    return [out.detach(), *(leaf.grad for leaf in (x, probs, *weights))]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", TRIED)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("experts_class", [GroupedExperts, SeparateExperts])
def test_equal_a_loop(
    experts_class: type[GroupedExperts],
    case: tuple[int, int, int, float],
    kind: str,
    dtype: str,
) -> None:
    changes = {**KINDS[kind], **(BF16 if dtype == "bf16" else {})}
    experts = _experts(experts_class, case[1], case[2], **changes)
    inputs = _inputs(case, experts.weight1.dtype)
    rows = plan_rows(inputs[2], case[2])
    tolerance = 1e-5 if dtype == "fp32" else 4e-2
    for mine, expected in zip(_run(experts, inputs, rows), _loop(experts, inputs), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=tolerance, atol=tolerance)
    unused = inputs[2].sum(0) == 0
    for weight in (experts.weight1, experts.weight2):
        assert not weight.grad[unused].any()  # exactly 0, also where memory held NaN


class _WideExperts(GroupedExperts):
    """Experts with products that take float64; ``grouped_mm`` does not."""

    def multiply(self, layer: Any, operand: Any, weight: Any, rows: ExpertRows) -> torch.Tensor:
        return self._product(operand, weight.transpose(1, 2), rows)

    def input_gradient(self, layer: Any, grad: Any, weight: Any, rows: ExpertRows) -> torch.Tensor:
        return self._product(grad, weight, rows)

    def weight_gradient(self, layer: Any, grad: Any, operand: Any, rows: Any) -> torch.Tensor:
        parts = zip(self._parts(grad, rows), self._parts(operand, rows), strict=True)
        return torch.stack([a.t() @ b for a, b in parts])

    def _parts(self, x: torch.Tensor, rows: ExpertRows) -> tuple[torch.Tensor, ...]:
        return x.split(rows.counts_E.tolist())

    def _product(self, x: torch.Tensor, matrices: Any, rows: ExpertRows) -> torch.Tensor:
        return torch.cat([a @ b for a, b in zip(self._parts(x, rows), matrices, strict=True)])


@pytest.mark.skipif(is_interpreted(), reason="kernels compute in float32")
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_gradcheck(kind: str) -> None:
    case = (6, 3, 2, 0.2)
    experts = _experts(_WideExperts, case[1], case[2], **KINDS[kind]).double()
    inputs = _inputs(case, torch.float64)
    rows = plan_rows(inputs[2], case[2]).trimmed()
    leaves = [x.double().requires_grad_() for x in inputs[:2]]

    def call(x: torch.Tensor, probs: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = experts(x, rows, probs)[0]
        return out

    assert torch.autograd.gradcheck(call, (*leaves, experts.weight1, experts.weight2))


def test_only_needed_gradients() -> None:
    case = CASES[0]
    experts = _experts(GroupedExperts, case[1], case[2])
    x, probs, map_TE, grad = _inputs(case, torch.float32)
    experts.weight1.requires_grad_(False)
    out, _ = experts(x, plan_rows(map_TE, case[2]), probs)
    out.backward(grad)
    assert experts.weight1.grad is None and experts.weight2.grad.any()


def test_keeps_tokens_and_first_layer_only() -> None:
    """The memory that a layer holds for its backward pass."""
    case = CASES[1]
    experts = _experts(GroupedExperts, case[1], case[2])
    x, probs, map_TE, _ = _inputs(case, torch.float32)
    shapes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(x.requires_grad_(), plan_rows(map_TE, case[2]), probs)
    rows = case[0] * case[2]
    weights = {tuple(experts.weight1.shape), tuple(experts.weight2.shape)}
    assert set(shapes) - weights == {(case[0], HIDDEN), (rows, 2 * FFN), (rows,)}


def test_in_the_interpreter() -> None:
    rerun_interpreted(__file__)
