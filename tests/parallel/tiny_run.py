"""A tiny GPT with experts and a bare training loop, for tests of checkpoints."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

from moetron.moe.config import bridge
from moetron.moe.config.derived import num_microbatches, virtual_pipeline_size
from moetron.moe.config.settings import Settings
from moetron.moe.host.adapt import adapt_host
from moetron.moe.training.checkpoint import load_checkpoint, save_checkpoint
from moetron.moe.training.progress import Progress

STREAM = {"mock": {"seed": 0}}
VOCABULARY, LENGTH, SAMPLES = 96, 16, 4
LAYOUT = {
    "ep2": {"expert_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "zero": {"use_distributed_optimizer": True},
    "ep2_zero": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
}
"""Layouts by name; any other name is plain data parallelism."""

Metrics = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def tiny_settings(
    layout: str = "dp", bf16: bool = False, optimizer: str = "adam", **checkpoint: Any
) -> Settings:
    """Two layers, four experts, dropout on (so that random-number states matter)."""
    return Settings.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "seq_length": LENGTH,
                "hidden_dropout": 0.1,
            },
            "moe": {
                "num_experts": 4,
                "moe_ffn_hidden_size": 24,
                "moe_aux_loss_coeff": 0.01,
                "moe_grouped_gemm": False,
            },
            "parallel": LAYOUT.get(layout, {}),
            "precision": {"bf16": bf16},
            "training": {
                "train_iters": 8,
                "micro_batch_size": 1,
                "global_batch_size": SAMPLES,
            },
            "optimizer": {"optimizer": optimizer},
            "learning_rate": {"lr": 1e-2},
            "checkpoint": checkpoint,
        }
    )


def start(settings: Settings, seed: int) -> tuple[list[Any], MegatronOptimizer]:
    """Model chunks and optimizer, seeded with ``seed``."""
    adapt_host()
    parallel = settings.parallel
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(settings),
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    config = bridge.transformer_config(settings)
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        VOCABULARY,
        LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    chunk = DistributedDataParallel(
        config,
        bridge.ddp_config(settings),
        Float16Module(config, model) if settings.precision.bf16 else model,
    )
    chunk.broadcast_params()
    optimizer = get_megatron_optimizer(
        bridge.optimizer_config(settings), [chunk], use_gloo_process_groups=False
    )
    return [chunk], optimizer


def train(
    chunks: list[Any], optimizer: MegatronOptimizer, settings: Settings, first: int, last: int
) -> Metrics:
    """Steps ``first`` to ``last`` - 1 on samples that depend on their number alone."""
    forward_backward = get_forward_backward_func()
    micro_batches = num_microbatches(settings, torch.distributed.get_world_size())
    metrics = []
    for step in range(first, last):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=_forward,
            data_iterator=_samples(step, micro_batches),
            model=chunks,
            num_microbatches=micro_batches,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        loss = torch.tensor([float(sum(losses)) if losses else 0.0])
        torch.distributed.all_reduce(loss)
        metrics.append((loss.item(), float(norm)))
    return metrics


def _samples(step: int, micro_batches: int) -> Iterator[torch.Tensor]:
    ranks, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    for micro_batch in range(micro_batches):
        number = step * SAMPLES + micro_batch * ranks + rank
        generator = torch.Generator().manual_seed(number)
        yield torch.randint(VOCABULARY, (1, LENGTH + 1), generator=generator)


def _forward(samples: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    sample = next(samples)
    tokens, labels = sample[:, :-1], sample[:, 1:]
    positions = torch.arange(LENGTH)[None]
    losses = model(tokens, positions, None, labels=labels)
    return losses, partial(_sum)


def _sum(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = losses.float().sum()
    return total, torch.tensor(losses.numel()), total.detach()


def save_at(
    folder: str, chunks: list[Any], optimizer: MegatronOptimizer, settings: Settings, step: int
) -> None:
    """Save as step ``step``."""
    progress = Progress(step, step * SAMPLES, step * SAMPLES * LENGTH)
    save_checkpoint(Path(folder), progress, chunks, optimizer, settings, STREAM)


def load_from(
    folder: str, chunks: list[Any], optimizer: MegatronOptimizer, settings: Settings
) -> Progress:
    """Load the run's latest."""
    return load_checkpoint(Path(folder), chunks, optimizer, settings, STREAM)
