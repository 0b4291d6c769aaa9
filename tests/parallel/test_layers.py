"""The OLMoE block in every layout against one process: losses and all gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank

from moetron.moe.config.bridge import ddp_config, transformer_config
from moetron.moe.config.settings import Settings
from moetron.moe.layers.build import build_model
from moetron.moe.routing.losses import read_auxiliary_losses
from moetron.moe.routing.record import RoutingRecorder
from tests.parallel.harness import model_parallel, run_ranks
from tests.parallel.sharded import assemble, fill, local_shards

SEQUENCE, SAMPLES, VOCABULARY = 16, 4, 60

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": SEQUENCE,
    "ffn_hidden_size": 48,
    "qk_layernorm": True,
    "qk_layernorm_scope": "full",
    "init_method": "truncated_normal",
    "init_method_std": 0.2,  # so that every gradient is far from zero
    "scaled_output_init": False,
    "make_vocab_size_divisible_by": 8,
}
MOE = {
    "num_experts": 8,
    "moe_layer_freq": [1, 0, 1, 1],
    "moe_ffn_hidden_size": 16,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": True,
    "moe_aux_loss_coeff": 0.05,
    "moe_z_loss_coeff": 0.01,
}


def _settings(parallel: dict[str, Any], moe: dict[str, Any]) -> Settings:
    return Settings.model_validate(
        {
            "model": MODEL,
            "moe": {**MOE, **moe},
            "parallel": parallel,
            "precision": {"bf16": False},
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": SAMPLES},
            "learning_rate": {"lr": 1e-3},
        }
    )


def _micro_batches() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCABULARY, (SAMPLES, SEQUENCE + 1), generator=generator)
    rank = parallel_state.get_data_parallel_rank()
    return iter(tokens[rank :: parallel_state.get_data_parallel_world_size()].unsqueeze(1))


def _forward_step(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> Any:
    tokens = next(batches)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    batch = get_batch_on_this_cp_rank({**batch, "positions": torch.arange(SEQUENCE).unsqueeze(0)})
    losses = model(batch["tokens"], batch["positions"], None, labels=batch["labels"])

    def loss_sum(losses: torch.Tensor) -> Any:
        count = torch.tensor(losses.numel(), dtype=torch.int)
        return losses.sum(), count, {"sum": losses.detach().sum()}

    return losses, loss_sum


def _step(
    parallel: dict[str, Any], moe: dict[str, Any], weights: dict[str, torch.Tensor] | None
) -> dict[str, Any]:
    """One step's loss, auxiliary losses, routing, gradients; the weights before it."""
    settings = _settings(parallel, moe)
    config = transformer_config(settings)
    config.finalize_model_grads_func = finalize_model_grads
    sizes = {
        name: getattr(config, name)
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "context_parallel_size",
        )
    }
    with model_parallel(**sizes):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        stage, stages = groups.pp.rank(), groups.pp.size()
        virtual = config.virtual_pipeline_model_parallel_size
        chunks = [
            build_model(
                settings,
                config,
                VOCABULARY,
                pre_process=stage == 0 and not vp_stage,
                post_process=stage == stages - 1 and vp_stage in (None, (virtual or 1) - 1),
                vp_stage=vp_stage,
            )
            for vp_stage in (range(virtual) if virtual else [None])
        ]
        if weights is not None:
            fill(chunks, weights)
        model = [DistributedDataParallel(config, ddp_config(settings), chunk) for chunk in chunks]
        data_ranks = groups.dp.size()
        with RoutingRecorder(model, settings) as recorder:
            outputs = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=[_micro_batches() for _ in model],
                model=model,
                num_microbatches=SAMPLES // data_ranks,
                seq_length=SEQUENCE,
                micro_batch_size=1,
                forward_only=False,
            )
            routing = recorder.summary()
        loss = sum((output["sum"] for output in outputs), torch.zeros(()))
        torch.distributed.all_reduce(loss)
        tensor_ranks = groups.tp.size()
        return {
            "loss": float(loss) / (tensor_ranks * SAMPLES * SEQUENCE),
            "auxiliary": read_auxiliary_losses(settings, SAMPLES // data_ranks, groups),
            "chosen": routing.chosen,
            "kept": routing.kept,
            "weights": local_shards(chunks, lambda parameter: parameter.detach()),
            "gradients": local_shards(chunks, lambda parameter: parameter.main_grad),
        }


def _run(ranks: int, parallel: dict[str, Any], moe: dict[str, Any], weights: Any) -> dict[str, Any]:
    results = run_ranks(_step, ranks, parallel, moe, weights)
    return {
        **results[0],
        "weights": assemble(result["weights"] for result in results),
        "gradients": assemble(result["gradients"] for result in results),
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return _run(1, {}, {}, None)


TP, EP, PP = (f"{kind}_model_parallel_size" for kind in ("tensor", "expert", "pipeline"))
CP = "context_parallel_size"
ETP, VPP = "expert_tensor_parallel_size", "num_layers_per_virtual_pipeline_stage"


@pytest.mark.parametrize(
    ("ranks", "parallel", "moe"),
    [
        pytest.param(1, {}, {"moe_grouped_gemm": False}, id="sequential experts"),
        pytest.param(2, {}, {}, id="DP2"),
        pytest.param(2, {TP: 2}, {}, id="TP2 ETP2"),
        pytest.param(2, {TP: 2, ETP: 1}, {}, id="TP2 ETP1"),
        pytest.param(2, {EP: 2}, {}, id="EP2"),
        pytest.param(2, {EP: 2}, {"moe_token_dispatcher_type": "allgather"}, id="EP2 allgather"),
        pytest.param(2, {TP: 2, EP: 2, ETP: 1}, {}, id="TP2 EP2"),
        pytest.param(2, {PP: 2}, {}, id="PP2"),
        pytest.param(2, {CP: 2}, {}, id="CP2"),
        pytest.param(2, {CP: 2, EP: 2}, {}, id="CP2 EP2"),
        pytest.param(2, {PP: 2, VPP: 1}, {}, id="PP2 VPP2"),
        pytest.param(4, {TP: 2, EP: 2, ETP: 2}, {}, id="TP2 EP2 ETP2", marks=pytest.mark.slow),
        pytest.param(4, {TP: 2, CP: 2, EP: 2, ETP: 1}, {}, id="TP2 CP2", marks=pytest.mark.slow),
        pytest.param(4, {CP: 4}, {}, id="CP4", marks=pytest.mark.slow),
    ],
)
def test_layout_equals_one_process(
    alone: dict[str, Any], ranks: int, parallel: dict[str, Any], moe: dict[str, Any]
) -> None:
    result = _run(ranks, parallel, moe, alone["weights"])
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert result["auxiliary"] == pytest.approx(alone["auxiliary"], rel=1e-5)
    assert torch.equal(result["chosen"], alone["chosen"])
    assert int(result["chosen"].sum()) == 3 * SAMPLES * SEQUENCE * MOE["moe_router_topk"]
    assert result["gradients"].keys() == alone["gradients"].keys()
    for key, expected in alone["gradients"].items():
        scale = float(expected.abs().max())
        assert scale > 0, key
        torch.testing.assert_close(
            result["gradients"][key], expected, rtol=1e-4, atol=1e-5 * scale, msg=key
        )


def test_capacity_drops_are_counted() -> None:
    moe = {"moe_expert_capacity_factor": 0.5, "moe_aux_loss_coeff": 0.0}
    one = _run(1, {}, moe, None)
    two = _run(2, {EP: 2}, moe, one["weights"])
    assert torch.equal(one["chosen"], two["chosen"]) and torch.equal(one["kept"], two["kept"])
    capacity = 0.5 * MOE["moe_router_topk"] * SEQUENCE / MOE["num_experts"]
    assert int(one["kept"].max()) <= capacity * SAMPLES < int(one["chosen"].max())


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_padding_to_capacity_changes_nothing(policy: str) -> None:
    """5 slots: 0.5 x 16 / 8 would be 1. Sequences are micro-batches, so that ranks cut alike."""
    moe = {
        "moe_expert_capacity_factor": 0.5,
        "moe_capacity_includes_topk": False,
        "moe_minimum_capacity": 5,
        "moe_token_drop_policy": policy,
    }
    plain = _run(1, {}, moe, None)
    padded = _run(2, {EP: 2}, {**moe, "moe_pad_expert_input_to_capacity": True}, plain["weights"])
    assert 0 < int(plain["kept"].sum()) < int(plain["chosen"].sum())
    assert int(plain["kept"].max()) <= 5 * SAMPLES
    assert torch.equal(plain["kept"], padded["kept"])
    assert padded["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    for key, expected in plain["gradients"].items():
        torch.testing.assert_close(
            padded["gradients"][key], expected, rtol=1e-4, atol=1e-6, msg=key
        )
