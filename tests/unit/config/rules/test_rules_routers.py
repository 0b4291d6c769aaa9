"""Rules on routers other than plain top-k, each triggered alone."""

from typing import Any

import pytest

from moetron.moe.config.schema.experts import MoESettings
from tests.unit.config.config_cases import found

NEEDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "expert_choice": {"moe_router_pre_softmax": True, "moe_expert_capacity_factor": 1.0},
    "base": {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"},
    "random_second": {"moe_expert_capacity_factor": 1.25},
    "noisy_topk": {},
    "straight_through": {"moe_router_pre_softmax": True},
    "gumbel": {"moe_router_pre_softmax": True},
    "relaxed_topk": {},
    "reinforce": {"moe_router_topk": 1},
    "hash": {"moe_router_topk": 1},
}


def _kind(kind: str, **changes: Any) -> dict[str, Any]:
    return {"moe_router_type": kind, **NEEDS[kind], **changes}


def test_every_router_is_accepted() -> None:
    annotation = MoESettings.model_fields["moe_router_type"].annotation
    assert set(NEEDS) == set(annotation.__args__)
    for kind in NEEDS:
        assert found(**_kind(kind)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe_expert_choice_eval": "topk"}, "topk needs --moe-router-type expert_choice"),
        ({"moe_second_expert_threshold": 0.5}, "0.5 needs --moe-router-type random_second"),
        ({"moe_router_temperature": 2.0}, "needs --moe-router-type gumbel or relaxed_topk"),
        ({"moe_router_anneal_samples": 9}, "--moe-router-anneal-samples 9 needs"),
        ({"moe_router_final_temperature": 0.5}, "--moe-router-final-temperature 0.5 needs"),
        (
            {"moe_router_load_balancing_type": "noisy_load"},
            "noisy_load needs --moe-router-type noisy_topk",
        ),
        (
            {
                "moe_aux_loss_first_choice_only": True,
                "moe_router_load_balancing_type": "none",
            },
            "--moe-aux-loss-first-choice-only needs --moe-router-load-balancing-type aux_loss",
        ),
        ({"num_experts": None, "moe_router_type": "noisy_topk"}, "needs --num-experts"),
        (
            _kind("noisy_topk", moe_router_load_balancing_type="sinkhorn"),
            "both assign: use one of them",
        ),
        (_kind("expert_choice", moe_aux_loss_coeff=0.1), "drop --moe-aux-loss-coeff 0.1"),
        (_kind("expert_choice", moe_expert_capacity_factor=None), "needs --moe-expert-capacity"),
        (
            _kind("expert_choice", moe_token_drop_policy="position"),
            "--moe-token-drop-policy position is incompatible with --moe-router-type expert_choice",
        ),
        (
            _kind("gumbel", moe_router_num_groups=4, moe_router_group_topk=2),
            "--moe-router-num-groups 4 is incompatible with --moe-router-type gumbel",
        ),
        (_kind("gumbel", moe_router_pre_softmax=False), "add --moe-router-pre-softmax"),
        (
            _kind("relaxed_topk", moe_router_score_function="sigmoid"),
            "relaxed_topk needs --moe-router-score-function softmax",
        ),
        (_kind("hash", moe_aux_loss_coeff=0.1), "--moe-aux-loss-coeff 0.1 is incompatible with"),
        (_kind("hash", moe_router_pre_softmax=True), "drop --moe-router-pre-softmax"),
        (_kind("hash", mtp_num_layers=1), "drop --mtp-num-layers"),
        (
            _kind("reinforce", pipeline_model_parallel_size=2, world_size=2),
            "use --pipeline-model-parallel-size 1",
        ),
        (_kind("base", moe_router_topk=2), "use --moe-router-topk 1"),
        (_kind("base", moe_router_enable_expert_bias=True), "is incompatible with"),
        (
            _kind("random_second", moe_router_pre_softmax=True),
            "renormalises the weights",
        ),
        (
            _kind("random_second", moe_router_pre_softmax=True, moe_router_topk=1),
            "needs --moe-router-topk 2 or more",
        ),
    ],
)
def test_refused(changes: dict[str, Any], expected: str) -> None:
    problems = found(**changes)
    assert any(expected in problem for problem in problems), problems
    assert len(problems) <= 2
