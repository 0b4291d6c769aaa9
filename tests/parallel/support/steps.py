"""Steps of a small model with OLMoE's blocks in a layout: losses, routing, all gradients."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import unwrap_model

from moetron.moe.config.bridge import ddp_config, transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.encoder_decoder.build_stacks import build
from moetron.moe.encoder_decoder.relative_bias import finalize_stack_gradients
from moetron.moe.host.context_parallel import own_chunks
from moetron.moe.routing.expert_bias import finalize_gradients
from moetron.moe.routing.losses import forget_auxiliary_losses
from moetron.moe.routing.routing_record import RoutingRecorder
from tests.parallel.support.auxiliary import read_auxiliary_losses
from tests.parallel.support.harness import model_parallel, run_ranks
from tests.parallel.support.sharded import assemble, fill, local_shards

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


@dataclass(frozen=True)
class Case:
    """Settings of a run; the keys are names of settings."""

    parallel: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    performance: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False
    data: dict[str, Any] = field(default_factory=dict)
    segments: tuple[int, ...] | None = None
    """Of every sample of an encoder-decoder, [SEQUENCE]."""
    micro_batch_size: int = 1
    steps: int = 1
    """Gradients are those of the last step; no step changes the weights."""


def _settings(case: Case) -> Settings:
    return Settings.model_validate(
        {
            "model": {**MODEL, **case.model},
            "attention": case.attention,
            "moe": {**MOE, **case.moe},
            "parallel": case.parallel,
            "performance": case.performance,
            "data": case.data,
            "precision": {"bf16": case.bf16},
            "training": {
                "train_iters": 1,
                "micro_batch_size": case.micro_batch_size,
                "global_batch_size": SAMPLES,
            },
            "learning_rate": {"lr": 1e-3},
        }
    )


def _micro_batches(size: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCABULARY, (SAMPLES, SEQUENCE + 1), generator=generator)
    rank = parallel_state.get_data_parallel_rank()
    return iter(tokens.split(size)[rank :: parallel_state.get_data_parallel_world_size()])


def _forward_step(
    segments: tuple[int, ...] | None,
    batches: Iterator[torch.Tensor],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> Any:
    tokens = next(batches)
    stacks: dict[str, Any] = {}
    if segments is not None:
        stacks = {"segments": torch.tensor(segments).expand(len(tokens), -1)}
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    positions = torch.arange(SEQUENCE).expand(len(tokens), -1)
    group = parallel_state.get_context_parallel_group()
    batch = {name: own_chunks(x, 1, group) for name, x in {**batch, "positions": positions}.items()}
    run = unwrap_model(model).build_schedule_plan if return_schedule_plan else model
    losses = run(batch["tokens"], batch["positions"], None, labels=batch["labels"], **stacks)

    def loss_sum(losses: torch.Tensor) -> Any:
        count = torch.tensor(losses.numel(), dtype=torch.int)
        return losses.sum(), count, {"sum": losses.detach().sum()}

    return losses, loss_sum


def _rank_main(cases: list[Case], weights: dict[str, torch.Tensor] | None) -> list[dict[str, Any]]:
    return [_run_case(case, weights) for case in cases]


def _run_case(case: Case, weights: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    settings = _settings(case)
    config = transformer_config(settings)
    config.finalize_model_grads_func = finalize_gradients
    if settings.model.encoder_num_layers is not None:
        config.finalize_model_grads_func = finalize_stack_gradients
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
            build(
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
        cast = [Float16Module(config, chunk) if case.bf16 else chunk for chunk in chunks]
        model = [DistributedDataParallel(config, ddp_config(settings), chunk) for chunk in cast]
        data_ranks = groups.dp.size()
        micro_batches = SAMPLES // data_ranks // case.micro_batch_size
        with RoutingRecorder(model, settings) as recorder:
            for _ in range(case.steps):
                recorder.reset()
                forget_auxiliary_losses()
                for chunk in model:
                    chunk.zero_grad_buffer()
                outputs = get_forward_backward_func()(
                    forward_step_func=partial(_forward_step, case.segments),
                    data_iterator=[_micro_batches(case.micro_batch_size) for _ in model],
                    model=model,
                    num_microbatches=micro_batches,
                    seq_length=SEQUENCE,
                    micro_batch_size=case.micro_batch_size,
                    forward_only=False,
                )
            routing = recorder.summary()
        loss = sum((output["sum"] for output in outputs), torch.zeros(()))
        torch.distributed.all_reduce(loss)
        tensor_ranks = groups.tp.size()
        return {
            "loss": float(loss) / (tensor_ranks * SAMPLES * SEQUENCE),
            "auxiliary": read_auxiliary_losses(settings, micro_batches, groups),
            "chosen": routing.chosen,
            "kept": routing.kept,
            "kept_at": routing.kept_at,
            "weights": local_shards(chunks, lambda parameter: parameter.detach()),
            "gradients": local_shards(chunks, lambda parameter: parameter.main_grad),
        }


def run_all(
    ranks: int, cases: list[Case], weights: dict[str, torch.Tensor] | None = None
) -> list[dict[str, Any]]:
    """Run each of ``cases`` from ``weights`` (None: random ones), one launch for all.

    Returns of each ``loss``, ``auxiliary``, ``chosen``, ``kept`` and ``kept_at`` of the last step,
    and by name the global ``weights`` and ``gradients``.
    """
    by_rank = run_ranks(_rank_main, ranks, cases, weights)
    return [
        {
            **results[0],
            "weights": assemble(result["weights"] for result in results),
            "gradients": assemble(result["gradients"] for result in results),
        }
        for results in zip(*by_rank, strict=True)
    ]


def run(ranks: int, case: Case, weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Run `run_all` for one case."""
    return run_all(ranks, [case], weights)[0]


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert equal choices, and losses and gradients equal up to rounding."""
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert result["auxiliary"] == pytest.approx(expected["auxiliary"], rel=1e-5)
    assert torch.equal(result["chosen"], expected["chosen"])
    assert torch.equal(result["kept"], expected["kept"])
    assert torch.equal(result["kept_at"], expected["kept_at"])
    assert result["gradients"].keys() == expected["gradients"].keys()
    for key, gradient in expected["gradients"].items():
        scale = float(gradient.abs().max())
        assert scale > 0, key
        torch.testing.assert_close(
            result["gradients"][key], gradient, rtol=1e-4, atol=1e-5 * scale, msg=key
        )
