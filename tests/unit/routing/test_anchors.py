"""Losses of real routers for uniform and collapsed routing, against the papers' formulas."""

from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from router_cases import hidden_states, make_router
from router_cases import parallel_state as parallel_state

from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.published_coefficients import CONVENTIONS, balance_coefficient
from moetron.moe.routing.losses import forget_auxiliary_losses
from moetron.moe.routing.router import Router
from tests.parallel.support.auxiliary import read_auxiliary_losses


def _losses(router: Router, **moe: Any) -> dict[str, float]:
    forget_auxiliary_losses()
    router(hidden_states().abs())
    settings = Settings.model_validate(
        {
            "model": {
                "num_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 2,
                "seq_length": 12,
            },
            "moe": moe,
            "training": {"train_iters": 1, "micro_batch_size": 2, "global_batch_size": 2},
            "learning_rate": {"lr": 1e-3},
        }
    )
    return read_auxiliary_losses(settings, 1, ProcessGroupCollection.use_mpu_process_groups())


@pytest.mark.parametrize(("experts", "topk", "z"), [(64, 8, 17.296), (32, 2, 12.011)])
def test_uniform_routing(experts: int, topk: int, z: float) -> None:
    """Logits of zero: (ln E)^2; balance 1 whatever k, k in flaxformer's and HuggingFace's scale."""
    moe = {
        "num_experts": experts,
        "moe_router_topk": topk,
        "moe_router_pre_softmax": True,
        "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 0.001,
    }
    router = make_router(**moe)
    torch.nn.init.zeros_(router.weight)
    losses = _losses(router, **moe)
    assert losses["z_loss"] == pytest.approx(z, abs=5e-4)
    assert losses["aux_loss"] == pytest.approx(1.0)
    theirs = balance_coefficient(1.0, CONVENTIONS["flaxformer"], 1, topk, experts)
    assert theirs * losses["aux_loss"] == pytest.approx(topk)


def test_collapse_onto_one_expert() -> None:
    """K = 1 and all probability on expert 0: the balance loss is E."""
    moe = {
        "num_experts": 16,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_aux_loss_coeff": 0.01,
    }
    router = make_router(**moe)
    torch.nn.init.zeros_(router.weight)
    with torch.no_grad():
        router.weight[0] = 100.0
    assert _losses(router, **moe)["aux_loss"] == pytest.approx(16.0)
