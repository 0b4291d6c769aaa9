"""The OLMoE block in every layout against one process: losses and all gradients."""

from typing import Any

import pytest
import torch

from tests.parallel.support.steps import MOE, SAMPLES, SEQUENCE, Case, assert_same, run


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run(1, Case())


TP, EP, PP = (f"{kind}_model_parallel_size" for kind in ("tensor", "expert", "pipeline"))
CP = "context_parallel_size"
LAYOUT = "pipeline_model_parallel_layout"
ETP, VPP = "expert_tensor_parallel_size", "num_layers_per_virtual_pipeline_stage"


@pytest.mark.parametrize(
    ("ranks", "parallel", "moe"),
    [
        pytest.param(1, {}, {"moe_grouped_gemm": False}, id="sequential experts"),
        pytest.param(2, {}, {}, id="DP2"),
        pytest.param(2, {TP: 2}, {}, id="TP2 ETP2"),
        pytest.param(2, {TP: 2, ETP: 1}, {}, id="TP2 ETP1"),
        pytest.param(2, {TP: 2, ETP: 1}, {"moe_grouped_gemm": False}, id="TP2 ETP1 sequential"),
        pytest.param(2, {EP: 2}, {}, id="EP2"),
        pytest.param(2, {EP: 2}, {"moe_token_dispatcher_type": "allgather"}, id="EP2 allgather"),
        pytest.param(2, {TP: 2, EP: 2, ETP: 1}, {}, id="TP2 EP2"),
        pytest.param(2, {PP: 2}, {}, id="PP2"),
        pytest.param(2, {CP: 2}, {}, id="CP2"),
        pytest.param(2, {CP: 2, EP: 2}, {}, id="CP2 EP2"),
        pytest.param(2, {PP: 2, VPP: 1}, {}, id="PP2 VPP2"),
        pytest.param(2, {PP: 2, LAYOUT: "Ett|t|t|L"}, {}, id="PP2 uneven VPP2"),
        pytest.param(
            4,
            {PP: 4, LAYOUT: "E|ttt|t|L"},
            {},
            id="PP4 ends without layers",
            marks=pytest.mark.slow,
        ),
        pytest.param(4, {TP: 2, EP: 2, ETP: 2}, {}, id="TP2 EP2 ETP2", marks=pytest.mark.slow),
        pytest.param(4, {TP: 2, CP: 2, EP: 2, ETP: 1}, {}, id="TP2 CP2", marks=pytest.mark.slow),
        pytest.param(4, {CP: 4}, {}, id="CP4", marks=pytest.mark.slow),
    ],
)
def test_layout_equals_one_process(
    one_rank: dict[str, Any], ranks: int, parallel: dict[str, Any], moe: dict[str, Any]
) -> None:
    result = run(ranks, Case(parallel, moe), one_rank["weights"])
    assert_same(result, one_rank)
    assert int(result["chosen"].sum()) == 3 * SAMPLES * SEQUENCE * MOE["moe_router_topk"]


def test_capacity_drops_are_counted() -> None:
    moe = {"moe_expert_capacity_factor": 0.5, "moe_aux_loss_coeff": 0.0}
    one = run(1, Case(moe=moe))
    two = run(2, Case({EP: 2}, moe), one["weights"])
    assert torch.equal(one["chosen"], two["chosen"]) and torch.equal(one["kept"], two["kept"])
    capacity = 0.5 * MOE["moe_router_topk"] * SEQUENCE / MOE["num_experts"]
    assert int(one["kept"].max()) <= capacity * SAMPLES < int(one["chosen"].max())


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_padding_to_capacity_changes_nothing(policy: str) -> None:
    """5 slots: 0.5 x 16 / 8 would be 1. Sequences are micro-batches, so that ranks drop equally."""
    moe = {
        "moe_expert_capacity_factor": 0.5,
        "moe_capacity_includes_topk": False,
        "moe_minimum_capacity": 5,
        "moe_token_drop_policy": policy,
    }
    plain = run(1, Case(moe=moe))
    padded = run(
        2, Case({EP: 2}, {**moe, "moe_pad_expert_input_to_capacity": True}), plain["weights"]
    )
    assert 0 < int(plain["kept"].sum()) < int(plain["chosen"].sum())
    assert int(plain["kept"].max()) <= 5 * SAMPLES
    assert torch.equal(plain["kept"], padded["kept"])
    assert padded["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    for key, expected in plain["gradients"].items():
        torch.testing.assert_close(
            padded["gradients"][key], expected, rtol=1e-4, atol=1e-6, msg=key
        )
