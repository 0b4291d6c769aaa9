"""Recorder of routing, and auxiliary losses."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.routing.losses import forget_auxiliary_losses
from moetron.moe.routing.router import Router
from moetron.moe.routing.routing_record import RoutingRecorder, RoutingSummary
from tests.parallel.support.auxiliary import read_auxiliary_losses
from tests.parallel.support.harness import model_parallel

EXPERTS, TOKENS = 8, 32


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        forget_auxiliary_losses()
        yield


def _settings(**moe: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "seq_length": TOKENS,
            },
            "moe": {
                "num_experts": EXPERTS,
                "moe_ffn_hidden_size": 8,
                "moe_layer_freq": [0, 1, 0, 1],
                "moe_router_pre_softmax": True,
                "moe_aux_loss_coeff": 0.1,
                "moe_z_loss_coeff": 0.01,
                **moe,
            },
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "learning_rate": {"lr": 1e-3},
        }
    )


def _routers(settings: Settings) -> torch.nn.ModuleList:
    config = transformer_config(settings)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    routers = torch.nn.ModuleList(Router(config, pg_collection=groups) for _ in range(2))
    for router, number in zip(routers, (2, 4), strict=True):
        router.set_layer_number(number)
    return routers


def _hidden() -> torch.Tensor:
    return torch.randn(TOKENS, 1, 16, dtype=torch.bfloat16)


def test_every_choice_is_counted_once_in_training() -> None:
    settings = _settings()
    routers = _routers(settings)
    with RoutingRecorder([routers], settings) as recorder:
        maps = [[router(_hidden())[1] for router in routers] for _ in range(3)]
        with torch.no_grad():
            routers[0](_hidden())  # the first pass of a recomputed layer, or evaluation
        summary = recorder.summary()
        recorder.reset()
        assert not recorder.summary().chosen.any()
    routers[0](_hidden())
    assert not recorder.summary().chosen.any()
    expected = torch.stack([sum(step[i].sum(0) for step in maps) for i in range(2)])
    assert torch.equal(summary.chosen, expected) and torch.equal(summary.kept, expected)
    assert summary.dropped_fraction == 0 and summary.chosen.dtype == torch.int64


@pytest.mark.parametrize("pad", [False, True])
def test_recorded_drops(pad: bool) -> None:
    settings = _settings(
        moe_expert_capacity_factor=0.5,
        moe_pad_expert_input_to_capacity=pad,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
    )
    routers = _routers(settings)
    with RoutingRecorder([routers], settings) as recorder:
        routers[1](_hidden())
        summary = recorder.summary()
    capacity = math.ceil(0.5 * 2 * TOKENS / EXPERTS)
    assert summary.chosen.sum(1).tolist() == [0, 2 * TOKENS]
    assert torch.equal(summary.kept, summary.chosen.clamp(max=capacity))
    kept = int(summary.kept.sum())
    assert summary.dropped_fraction == pytest.approx(1 - kept / (2 * TOKENS))


def test_position_keeps_sequence_by_sequence() -> None:
    settings = _settings(
        moe_expert_capacity_factor=1.0,
        moe_token_drop_policy="position",
        moe_capacity_includes_topk=False,
    )
    router = _routers(settings)[0]
    torch.nn.init.zeros_(router.weight)  # so that all tokens choose the same two experts
    probs, kept = router(torch.randn(16, 2, 16, dtype=torch.bfloat16))
    assert router.chosen is not None
    assert sorted(router.chosen.sum(0).tolist()) == [0] * 6 + [TOKENS] * 2
    kept_sb = kept.any(dim=1).view(16, 2)
    assert kept_sb[:, 0].tolist() == [True] * 4 + [False] * 12  # 32 tokens / 8 experts
    assert not kept_sb[:, 1].any()
    assert torch.equal(probs > 0, kept)


def test_one_rank_holds_the_micro_batch() -> None:
    kept = []
    for scope in ("rank", "micro_batch"):
        router = _routers(_settings(moe_expert_capacity_factor=0.5, moe_capacity_scope=scope))[0]
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
        hidden = torch.randn(16, 2, 16, generator=torch.Generator().manual_seed(5))
        kept.append(router(hidden.bfloat16())[1])
    assert torch.equal(*kept) and int(kept[0].sum(0).max()) == 4  # 0.5 x 2 x 32 / 8


def test_drops_by_position_grow_towards_the_end() -> None:
    settings = _settings(
        moe_expert_capacity_factor=1.0,
        moe_token_drop_policy="position",
        moe_capacity_scope="sequence",
        moe_aux_loss_coeff=0.0,
        moe_router_load_balancing_type="none",
    )
    routers = _routers(settings)
    torch.nn.init.zeros_(routers[0].weight)  # all tokens choose the same two experts
    with RoutingRecorder([routers], settings) as recorder:
        routers[0](torch.randn(TOKENS, 3, 16, dtype=torch.bfloat16))
        drops = recorder.summary().dropped_by_position
    slots = 2 * TOKENS // EXPERTS  # 8 of 32 tokens: the first 4 of 16 parts
    assert drops == [[0.0] * (slots // 2) + [1.0] * (16 - slots // 2), [0.0] * 16]


def test_evaluation_has_its_own_capacity() -> None:
    settings = _settings(
        moe_expert_capacity_factor=0.5, moe_eval_capacity_factor=0.125, moe_minimum_capacity=3
    )
    router = _routers(settings)[0]
    torch.nn.init.zeros_(router.weight)
    assert router(_hidden())[1].sum(0).max() == 4
    assert router.eval()(_hidden())[1].sum(0).max() == 3


def test_summary_metrics() -> None:
    chosen = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]])
    at = torch.tensor([[2, 0], [4, 4]])
    summary = RoutingSummary(chosen, chosen.clamp(max=8), at, at.clamp(max=1))
    assert summary.load_max_over_mean == (1 + 4) / 2
    assert summary.dropped_fraction == 8 / 32
    assert summary.dropped_fractions == [0, 8 / 16]
    assert summary.dropped_by_position == [[0.5, 0], [0.75, 0.75]]
    empty = RoutingSummary(*[torch.zeros(1, 4)] * 4)
    assert (empty.load_max_over_mean, empty.dropped_fraction) == (0, 0)
    assert empty.dropped_fractions == [0]


def _read(settings: Settings, num_microbatches: int) -> dict[str, float]:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return read_auxiliary_losses(settings, num_microbatches, groups)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_uniform_logits(kind: str, micro_batches: int) -> None:
    settings = _settings(moe_router_load_balancing_type=kind)
    routers = _routers(settings)
    for router in routers:
        torch.nn.init.zeros_(router.weight)
        for _ in range(micro_batches):
            router(_hidden())
    losses = _read(settings, micro_batches)
    assert losses["aux_loss"] == pytest.approx(1.0)
    assert losses["z_loss"] == pytest.approx(math.log(EXPERTS) ** 2)
    assert _read(settings, 1) == {"aux_loss": 0, "z_loss": 0}


def test_losses_that_are_off_are_absent() -> None:
    assert _read(_settings(moe_aux_loss_coeff=0.0, moe_z_loss_coeff=None), 1) == {}
    assert _read(_settings(num_experts=None), 1) == {}


@pytest.mark.parametrize("per_token", [True, False])
def test_gradients_equal_the_formula(per_token: bool) -> None:
    settings = _settings()
    router = _routers(settings)[0]
    router.calculate_per_token_loss = per_token
    hidden = _hidden()
    probs, _ = router(hidden)
    probs.sum().mul(0).backward()
    weight = router.weight.detach().float().requires_grad_()
    logits = hidden.view(TOKENS, 16).float() @ weight.T
    scores = logits.softmax(dim=-1)
    share = torch.bincount(scores.topk(2).indices.flatten(), minlength=EXPERTS) / (2 * TOKENS)
    balance = EXPERTS * (share * scores.mean(0)).sum()
    z = logits.logsumexp(dim=-1).square().mean()
    (0.1 * balance + 0.01 * z).mul(TOKENS if per_token else 1).backward()
    assert weight.grad is not None
    torch.testing.assert_close(router.weight.grad.float(), weight.grad, rtol=2e-2, atol=1e-3)


def test_layers_of_multi_token_prediction_follow_the_decoder() -> None:
    """megatron-core 0.19 numbers them from 1 and says so; 0.16.1 passes their place."""
    config = transformer_config(_settings())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    numbers = []
    for is_mtp_layer in (False, True):
        router = Router(config, pg_collection=groups, is_mtp_layer=is_mtp_layer)
        router.set_layer_number(1)
        numbers.append(router.layer_number)
    assert numbers == [1, 1 + config.num_layers]


def test_recomputed_passes_have_the_weight_of_their_micro_batch() -> None:
    """Two micro-batches run ahead without gradient before the first is recomputed."""
    router = _routers(_settings())[0]
    known = []
    for count in (3, 7):
        router.loss_tokens.set_next(torch.tensor(count))
        with torch.no_grad():
            router(_hidden())
    for _ in range(2):
        router(_hidden())
        known.append(int(router._loss_tokens))
    assert known == [3, 7]


def test_losses_of_a_router_in_bf16_are_summed_in_fp32() -> None:
    """--moe-router-dtype params: logits have 8 bits of precision, their losses that of fp32."""
    settings = _settings(moe_router_dtype="params")
    hidden, expected = _hidden(), {"aux_loss": 0.0, "z_loss": 0.0}
    for router in _routers(settings).bfloat16():
        torch.nn.init.normal_(router.weight)
        router(hidden)
        logits = router.gating(hidden).view(TOKENS, EXPERTS)
        assert logits.dtype == torch.bfloat16
        logits = logits.double()
        share = torch.bincount(logits.topk(2).indices.flatten(), minlength=EXPERTS) / (2 * TOKENS)
        expected["aux_loss"] += float(EXPERTS * (share * logits.softmax(1).mean(0)).sum()) / 2
        expected["z_loss"] += float(logits.logsumexp(1).square().mean()) / 2
    assert _read(settings, 1) == pytest.approx(expected, rel=1e-5)
