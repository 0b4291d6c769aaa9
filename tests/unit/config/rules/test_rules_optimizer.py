"""Rules on optimizers and parameter groups, and detection of routers that look ahead."""

from typing import Any

import pytest

from moetron.moe.config.schema.derived import looks_ahead
from tests.unit.config.config_cases import found, make


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"optimizer": "muon", "use_distributed_optimizer": True, "world_size": 2},
            "needs --optimizer adam, not --optimizer muon",
        ),
        ({"router_lr_mult": 0.5, "num_experts": None}, "--router-lr-mult 0.5 needs --num-experts"),
        ({"expert_wd_mult": 0.0, "num_experts": None}, "--expert-wd-mult 0.0 needs --num-experts"),
        (
            {"router_lr_mult": 2.0, "moe_router_type": "hash"},
            "--moe-router-type hash has no weights",
        ),
    ],
)
def test_refused(changes: dict[str, Any], expected: str) -> None:
    (problem,) = found(**changes)
    assert expected in problem


def test_allowed() -> None:
    assert found(optimizer="muon", router_lr_mult=0.5, expert_wd_mult=0.0) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"num_experts": None}, []),
        ({"moe_expert_capacity_factor": 1.0}, ["--moe-token-drop-policy probs"]),
        ({"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "choice"}, []),
        ({"moe_router_type": "base"}, ["--moe-router-type base"]),
        (
            {"moe_router_type": "expert_choice", "moe_expert_capacity_factor": 1.0},
            ["--moe-router-type expert_choice"],
        ),
        (
            {"moe_router_load_balancing_type": "sinkhorn"},
            ["--moe-router-load-balancing-type sinkhorn"],
        ),
    ],
)
def test_looks_ahead(changes: dict[str, Any], expected: list[str]) -> None:
    assert looks_ahead(make(**changes)) == expected


AWARE = {
    "use_precision_aware_optimizer": True,
    "use_distributed_optimizer": True,
    "bf16": True,
    "device": "cuda",
    "te": True,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"exp_avg_dtype": "bf16"}, "--exp-avg-dtype bf16 needs --use-precision-aware-optimizer"),
        ({**AWARE, "device": "cpu"}, "needs Transformer Engine on a GPU"),
        ({**AWARE, "te": False}, "needs Transformer Engine on a GPU"),
        ({**AWARE, "use_distributed_optimizer": False}, "needs --use-distributed-optimizer"),
        ({**AWARE, "bf16": False}, "--use-precision-aware-optimizer needs --bf16"),
        (
            {**AWARE, "fp8_format": "hybrid", "fp8_param_gather": True},
            "is not supported with --fp8-param-gather",
        ),
        (
            {**AWARE, "main_grads_dtype": "bf16"},
            "add --no-accumulate-allreduce-grads-in-fp32",
        ),
        (
            {**AWARE, "accumulate_allreduce_grads_in_fp32": False},
            "use --main-grads-dtype bf16",
        ),
    ],
)
def test_formats_of_optimizer_state(changes: dict[str, Any], expected: str) -> None:
    (problem,) = found(**changes)
    assert expected in problem
    assert not found(**AWARE, exp_avg_dtype="fp8", exp_avg_sq_dtype="bf16")
