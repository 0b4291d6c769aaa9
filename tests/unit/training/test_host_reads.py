"""A training step on a GPU waits for it as rarely as possible."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from moetron.moe.routing.router_types import KINDS
from tests.parallel.support.checkpoint_runs import parallel_of, start
from tests.parallel.support.checkpoint_runs import settings as run_settings
from tests.unit.training.host_reads import HostReads

ALLOWED = 1
HOST_SIDE = ("moe/training/batches.py", "moe/kernels/")
"""Works on host tensors, or in place of a kernel."""
DISPATCHER = (
    "megatron/core/transformer/moe/token_dispatcher.py",
    "megatron/core/transformer/moe/moe_utils.py",
)
"""Megatron-core's exchange of tokens reads the counts of experts, and selects by masks. It is
ignored only where a layer uses it."""
PRE = {"moe_router_pre_softmax": True}
LIMIT = {"moe_expert_capacity_factor": 1.0}
SIGMOID = {"moe_router_score_function": "sigmoid"}
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": PRE,
    "renormalised": {"moe_z_loss_coeff": 0.01},
    "sigmoid": SIGMOID,
    "bias": {**SIGMOID, "moe_router_enable_expert_bias": True},
    "groups": {**PRE, "moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "seq_aux_loss": {**PRE, "moe_router_load_balancing_type": "seq_aux_loss"},
    "global_aux_loss": {**PRE, "moe_router_load_balancing_type": "global_aux_loss"},
    "previous_step": {
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_global_aux_loss_counts": "previous_step",
    },
    "jitter": {"moe_input_jitter_eps": 0.1},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
    **{
        f"capacity by {policy}": {**LIMIT, "moe_token_drop_policy": policy}
        for policy in ("probs", "position", "choice", "batch_prioritized")
    },
    "padded": {**LIMIT, "moe_pad_expert_input_to_capacity": True},
    "expert_choice": {
        "moe_router_type": "expert_choice",
        **PRE,
        **LIMIT,
        "moe_aux_loss_coeff": 0.0,
    },
    "random_second": {"moe_router_type": "random_second", **LIMIT},
    "noisy_topk": {
        "moe_router_type": "noisy_topk",
        "moe_router_load_balancing_type": "noisy_load",
    },
    "straight_through": {"moe_router_type": "straight_through", **PRE},
    "gumbel": {"moe_router_type": "gumbel", **PRE, "moe_router_anneal_samples": 100},
    "relaxed_topk": {"moe_router_type": "relaxed_topk"},
    "reinforce": {"moe_router_type": "reinforce"},
    "hash": {"moe_router_type": "hash", "moe_aux_loss_coeff": 0.0},
}
"""All but BASE, whose assignment scipy solves on the host."""
OPTIMIZERS = ("adam", "sgd", "adafactor", "muon")


def reads_of_a_step(**groups: dict[str, Any]) -> dict[str, int]:
    """Return the waits of the second step, by place."""
    chosen = run_settings("dp", **groups)
    with parallel_of(chosen):
        loop = start(chosen)
        batches = loop.batches()
        loop.step(batches, lambda: False)
        modules = [module for chunk in loop.trainer.chunks for module in chunk.modules()]
        dispatchers = [
            module.token_dispatcher for module in modules if isinstance(module, MoELayer)
        ]
        is_megatrons = any(type(each).__module__.startswith("megatron.") for each in dispatchers)
        with HostReads(ignored=(*HOST_SIDE, *(DISPATCHER if is_megatrons else ()))) as reads:
            loop.step(batches, lambda: False)
    return reads.found


def check(found: dict[str, int]) -> None:
    assert 1 <= sum(found.values()) <= ALLOWED, "\n".join(
        f"{count} x {place}" for place, count in found.items()
    )


@pytest.mark.parametrize("router", ROUTERS)
def test_a_step_reads_once(router: str) -> None:
    check(reads_of_a_step(moe={**BASE_MOE, **ROUTERS[router]}))


BASE_MOE: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_aux_loss_coeff": 0.01}


def test_every_router_is_tested() -> None:
    kinds = {moe.get("moe_router_type", "topk") for moe in ROUTERS.values()}
    assert kinds == set(KINDS) - {"base"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_read_nothing(optimizer: str) -> None:
    check(reads_of_a_step(optimizer={"optimizer": optimizer}))


@pytest.mark.parametrize(
    "groups",
    [
        {"model": {"output_z_loss_coeff": 1e-4}},
        {"model": {"mtp_num_layers": 1}},
        {"precision": {"bf16": False}},
        {"parallel": {"use_distributed_optimizer": True}},
        {"training": {"calculate_per_token_loss": False}},
        {"optimizer": {"clip_grad": 1e-3}},
    ],
    ids=lambda groups: str(next(iter(groups.values()))),
)
def test_other_settings_read_nothing(groups: dict[str, dict[str, Any]]) -> None:
    merged = {
        "training": {"train_iters": 6, "micro_batch_size": 1, "global_batch_size": 4},
    } | groups
    check(reads_of_a_step(**merged))


def test_reads_are_found_where_they_are() -> None:
    tensor = torch.tensor([1.0, 0.0])
    with HostReads() as reads:
        if tensor[0] > 0:
            tensor.tolist()
        tensor[tensor > 0]
        torch.full((2,), tensor[0])
        host = tensor.cpu()
        host.sum().item()
    places = [place.rsplit(": ", 1) for place in reads.found]
    assert [name for _, name in places] == [
        *("__bool__", "tolist", "__getitem__", "aten::_local_scalar_dense", "cpu")
    ]
    assert all("test_host_reads.py" in place for place, _ in places)
