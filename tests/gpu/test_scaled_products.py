"""FP8 products with one scale a row on a GPU: kernels, experts, and the first step of a model.

Kernels are compared with torch operations on a CPU, products with the reference there.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.kernels.expert_rows import plan_rows
from moetron.moe.kernels.fp8_rows import (
    Fp8Rows,
    quantize_columns,
    quantize_rows,
    scaled_grouped_mm,
    scaled_mm,
)
from moetron.moe.layers.experts import GroupedExperts
from moetron.moe.layers.scaled_experts import ScaledGroupedExperts
from moetron.moe.verify.parity import Result, Tolerance, compare
from tests.gpu.devices import needs, needs_package
from tests.gpu.test_layouts import BF16
from tests.parallel.support.parity_cases import settings
from tests.parallel.support.parity_ranks import Run, results_of

pytestmark = [pytest.mark.gpu, needs(1, (9, 0))]

SCALED = {**BF16, "fp8_format": "hybrid", "fp8_recipe": "tensorwise"}
EXPERTS, TOPK = 8, 2


def _on_cpu(rows: Fp8Rows) -> Fp8Rows:
    return Fp8Rows(rows.values.cpu(), rows.inverse.cpu())


def _equal(got: Fp8Rows, wanted: Fp8Rows) -> bool:
    """Compare the bytes of numbers, and scales bit by bit."""
    same = torch.equal(got.values.cpu().view(torch.uint8), wanted.values.view(torch.uint8))
    return same and torch.equal(got.inverse.cpu(), wanted.inverse)


@pytest.mark.parametrize("shape", [(700, 2048), (3, 257, 130), (64, 1024, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_equal_torch_on_a_cpu_bit_by_bit(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = (torch.randn(shape) * torch.randn(shape).mul(3).exp()).to(dtype)
    x[0] = 0
    assert _equal(quantize_rows(x.cuda()), quantize_rows(x))
    assert _equal(quantize_columns(x.cuda()), quantize_columns(x))


@pytest.mark.parametrize(
    "ends",
    [
        (100, 100, 333, 400),  # ends at any row, an expert without rows
        (0, 0, 0, 400),
        (400, 400, 400, 400),
        (0, 0, 0, 0),
        (5, 6, 7, 250),  # later rows belong to nobody
    ],
    ids=str,
)
def test_grouped_products_equal_the_reference(ends: tuple[int, ...]) -> None:
    x = quantize_rows(torch.randn(400, 256, device="cuda"))
    weight = quantize_rows(torch.randn(4, 128, 256, device="cuda"))
    ends_E = torch.tensor(ends, dtype=torch.int32)
    got = scaled_grouped_mm(x, weight, ends_E.cuda(), torch.bfloat16)[: ends[-1]]
    wanted = scaled_grouped_mm(_on_cpu(x), _on_cpu(weight), ends_E, torch.float32)[: ends[-1]]
    torch.testing.assert_close(got.float().cpu(), wanted, rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("rows", [0, 1, 7, 4096])
def test_products_equal_the_reference(rows: int) -> None:
    x = quantize_rows(torch.randn(rows, 256, device="cuda"))
    weight = quantize_rows(torch.randn(128, 256, device="cuda"))
    got = scaled_mm(x, weight, torch.bfloat16)
    wanted = scaled_mm(_on_cpu(x), _on_cpu(weight), torch.float32)
    torch.testing.assert_close(got.float().cpu(), wanted, rtol=2e-2, atol=0.1)


def _experts(kind: type[GroupedExperts]) -> GroupedExperts:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=256,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=128,
        moe_router_topk=TOPK,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        perform_initialization=False,
    )
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups: Any = SimpleNamespace(ep=alone, expt_tp=alone, expt_dp=alone, tp=alone)
    experts = kind(EXPERTS, config, pg_collection=groups)
    torch.manual_seed(1)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return experts


@pytest.mark.parametrize("dropped", [0.0, 0.4, 1.0])
def test_experts_are_near_those_in_bfloat16(dropped: float) -> None:
    """Two experts without rows; with drops, rows that belong to nobody."""
    results = []
    for kind in (GroupedExperts, ScaledGroupedExperts):
        experts = _experts(kind)
        torch.manual_seed(2)
        x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
        probs = torch.rand(300, EXPERTS, device="cuda").requires_grad_()
        chosen = F.pad(torch.rand(300, EXPERTS - 2).argsort(1) < TOPK, (1, 1))
        chosen &= torch.rand(300, EXPERTS) >= dropped
        out, _ = experts(x, plan_rows(chosen.cuda(), TOPK), probs)
        out.backward(torch.randn_like(out))
        results.append([out, x.grad, probs.grad, experts.weight1.grad, experts.weight2.grad])
    for plain, scaled in zip(*results, strict=True):
        error = (scaled - plain).detach().float().norm()
        assert error <= 0.1 * plain.detach().float().norm()
        assert error > 0 or dropped == 1.0
    for gradient in results[1][3:]:
        assert gradient[0].eq(0).all() and gradient[-1].eq(0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"transformer_impl": "local"},
        pytest.param(
            {"transformer_impl": "transformer_engine", "moe_experts_impl": "grouped_mm"},
            marks=needs_package("transformer-engine", "transformer_engine"),
        ),
    ],
    ids=["local", "transformer_engine"],
)
def test_a_step_is_near_one_in_bfloat16(tmp_path: Path, changes: dict[str, Any]) -> None:
    def step(write: bool, values: dict[str, Any]) -> Result:
        run = Run(settings("dp1", 2, "cuda", **values), str(tmp_path / "weights"), write)
        ((_, result, _),) = results_of({"one": run}, 1, 1, "cuda")
        return result

    plain = step(True, {**BF16, "transformer_impl": "local"})
    found = compare(plain, step(False, {**SCALED, **changes}))
    assert found.within(Tolerance(loss=2e-2, grad_norm=0.1, gradient=0.5)), found
