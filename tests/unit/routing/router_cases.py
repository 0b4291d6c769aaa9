"""A router on one process, and its input."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.routing.router import Router
from moetron.moe.routing.router_types import router_class
from tests.parallel.support.harness import model_parallel

EXPERTS, LENGTH, BATCH, HIDDEN = 6, 12, 2, 8
TOKENS = LENGTH * BATCH


@pytest.fixture(autouse=True)
def parallel_state() -> Iterator[None]:
    """Provide megatron's parallel state; import the fixture to use it."""
    with model_parallel():
        yield


def make_settings(**moe: Any) -> Settings:
    """Return settings of one layer with experts, k = 2 by default."""
    return Settings.model_validate(
        {
            "model": {
                "num_layers": 1,
                "hidden_size": HIDDEN,
                "num_attention_heads": 2,
                "seq_length": LENGTH,
                "init_method_std": 1.0,
            },
            "moe": {"num_experts": EXPERTS, "moe_ffn_hidden_size": 8, **moe},
            "precision": {"bf16": False},
            "training": {"train_iters": 1, "micro_batch_size": BATCH, "global_batch_size": BATCH},
            "learning_rate": {"lr": 1e-3},
        }
    )


def make_router(**moe: Any) -> Router:
    """Return the router of layer 1 for the settings."""
    settings = make_settings(**moe)
    config = transformer_config(settings)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    router = router_class(config)(config, pg_collection=groups)
    router.set_layer_number(1)
    return router


def hidden_states() -> torch.Tensor:
    """Return fixed hidden states [s, b, H]."""
    return torch.randn(LENGTH, BATCH, HIDDEN, generator=torch.Generator().manual_seed(4))
