"""A layer that keeps its tokens, against the same layer with megatron-core's dispatcher."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.layers import build_model as building
from moetron.moe.layers.dispatcher import LocalDispatcher
from tests.parallel.support.harness import model_parallel

VOCABULARY, SEQUENCE, BATCH = 64, 24, 2
EVEN = {"moe_router_pre_softmax": True}
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {},
    "capacity": {"moe_expert_capacity_factor": 0.5},
    "position": {"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "position"},
    "shared": {"moe_shared_expert_intermediate_size": 16},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    "base": {
        "moe_router_type": "base",
        "moe_router_topk": 1,
        "moe_router_score_function": "sigmoid",
    },
    "random_second": {"moe_router_type": "random_second", "moe_expert_capacity_factor": 2.0},
    "noisy_topk": {"moe_router_type": "noisy_topk"},
    "straight_through": {"moe_router_type": "straight_through", **EVEN},
    "gumbel": {"moe_router_type": "gumbel", **EVEN},
    "relaxed_topk": {"moe_router_type": "relaxed_topk", **EVEN},
    "reinforce": {"moe_router_type": "reinforce"},
    "hash": {"moe_router_type": "hash"},
    "double gated": {"ffn_type": "double_gated"},
    "inner scale": {"moe_expert_multiplicative_bias": True, "moe_expert_capacity_factor": 0.5},
    "dropout": {"moe_expert_dropout": 0.3},
    "recomputed": {"recompute": True},
    "bf16": {"bf16": True},
    "fp8": {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "moe_expert_capacity_factor": 0.5},
}
EXCHANGED: dict[str, dict[str, Any]] = {
    "expert_choice": {
        "moe_router_type": "expert_choice",
        "moe_expert_capacity_factor": 1.0,
    },
    "padded": {
        "moe_expert_capacity_factor": 1.0,
        "moe_pad_expert_input_to_capacity": True,
    },
}


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _settings(changes: dict[str, Any]) -> Settings:
    moe = dict(changes)
    ffn = {"ffn_type": moe.pop("ffn_type")} if "ffn_type" in moe else {}
    recompute = moe.pop("recompute", False)
    precision = {
        name: moe.pop(name) for name in ("bf16", "fp8_format", "fp8_recipe") if name in moe
    }
    tree = {
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "ffn_hidden_size": 16,
            "seq_length": SEQUENCE,
            **ffn,
        },
        "moe": {"num_experts": 4, "moe_ffn_hidden_size": 8, "moe_router_topk": 2, **moe},
        "precision": precision,
        "training": {"train_iters": 1, "micro_batch_size": BATCH, "global_batch_size": BATCH},
        "learning_rate": {"lr": 1e-3},
    }
    if recompute:
        tree["parallel"] = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return Settings.model_validate(tree)


def _dispatchers(model: torch.nn.Module) -> list[Any]:
    return [m.token_dispatcher for m in model.modules() if isinstance(m, MoELayer)]


def _pass(settings: Settings) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return the model and, by name, the losses and gradients of a micro-batch."""
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    torch.manual_seed(7)
    model = building.build_model(settings, transformer_config(settings), VOCABULARY).train()
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    torch.manual_seed(8)
    losses = model(tokens, positions, None, labels=tokens)
    for module in model.modules():
        if hasattr(module, "reward"):
            module.reward(torch.ones(BATCH, SEQUENCE))
    losses.sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model, {"losses": losses.detach(), **found}


@pytest.mark.parametrize("router", ROUTERS)
def test_equals_the_layer_with_megatrons_dispatcher(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(ROUTERS[router])
    model, mine = _pass(settings)
    assert all(isinstance(d, LocalDispatcher) for d in _dispatchers(model))
    monkeypatch.setattr(building, "keep_tokens_local", lambda *_: None)
    model, expected = _pass(settings)
    assert all(type(d) is MoEAlltoAllTokenDispatcher for d in _dispatchers(model))
    assert mine.keys() == expected.keys() and len(mine) > 10
    tolerance = 2e-2 if router == "bf16" else 1e-5
    for name, value in mine.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", EXCHANGED)
def test_megatrons_dispatcher_stays_where_tokens_may_have_more_experts(case: str) -> None:
    settings = _settings(EXCHANGED[case])
    model = building.build_model(settings, transformer_config(settings), VOCABULARY)
    assert all(type(d) is MoEAlltoAllTokenDispatcher for d in _dispatchers(model))
