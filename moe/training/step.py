"""One optimizer step: forward and backward over all micro-batches, clipping, update, figures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model

from moetron.common.errors import RunError
from moetron.moe.config.bridge import ModelConfig
from moetron.moe.config.schema.derived import routed_layers
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.allocator import peak_memory_bytes
from moetron.moe.layers.attention import prefix_mask
from moetron.moe.routing.losses import read_auxiliary_losses
from moetron.moe.routing.routing_record import RoutingRecorder
from moetron.moe.training.batches import PER_SAMPLE, Batch
from moetron.moe.training.loss_tally import Losses, Tally
from moetron.moe.training.model_chunks import ModelChunks
from moetron.moe.training.optimizer import set_learning_rate
from moetron.moe.training.runtime import Runtime

BatchIterators = Sequence[Iterator[Batch] | None]
"""For each model chunk of this rank its micro-batches, None for a chunk that needs no samples."""


class NotFiniteError(RunError):
    """A loss or gradient norm that is infinite or not a number."""


@dataclass(frozen=True)
class Trainer:
    """What one rank trains, and with what."""

    settings: Settings
    runtime: Runtime
    config: ModelConfig
    vocab_size: int
    """Before padding."""
    chunks: ModelChunks
    optimizer: MegatronOptimizer
    recorder: RoutingRecorder | None
    """Counts where tokens go; None: a dense model."""


@dataclass(frozen=True)
class StepFigures:
    """What all ranks agree on after a step."""

    losses: Losses
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    besides: dict[str, Any]
    """``prediction_figures`` and ``routing_figures``."""
    loads: dict[str, np.ndarray]
    """For each layer with experts every expert's load over the mean load, float64 [E]."""
    stop: bool
    """Whether any rank asked to stop."""
    peak_memory_bytes: int
    """Of the rank with the highest, since its start: see `moe/host/allocator.py`."""


def train_step(
    trainer: Trainer,
    batches: BatchIterators,
    num_microbatches: int,
    learning_rate: float,
    stop_requested: Callable[[], bool],
    tally: Tally,
) -> StepFigures:
    """Take one step.

    Args:
        trainer: the model and its optimizer; both change.
        batches: iterators that yield this rank's next ``num_microbatches`` micro-batches.
        num_microbatches: micro-batches of every rank.
        learning_rate: of this step.
        stop_requested: whether this rank was asked to stop; shared with the others at the end.
        tally: counts the losses by corpus and objective.

    Raises:
        NotFiniteError: when the loss or the gradient norm is not finite and the settings check it.
    """
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    reports = run_schedule(trainer, batches, num_microbatches, partial(token_loss, tally))
    set_learning_rate(trainer.optimizer, learning_rate)
    _, grad_norm, _ = trainer.optimizer.step()
    local = tally.zeros(trainer.runtime.device)
    if trainer.runtime.holds_loss:
        local += torch.stack(reports).sum(0)
    stops = local.new_full((1,), stop_requested())
    memory_R = local.new_zeros(trainer.runtime.world_size)  # a slot for each rank: the sum is all
    memory_R[trainer.runtime.rank] = peak_memory_bytes(trainer.runtime.device)
    total = torch.cat([local.flatten(), stops, memory_R])
    torch.distributed.all_reduce(total)  # sums over all ranks: losses, wishes to stop, memory
    sums, stops, memory_R = total.split([local.numel(), 1, len(memory_R)])
    losses = tally.read(sums.view_as(local))
    routing, loads = routing_figures(trainer, num_microbatches)
    ahead = prediction_figures(trainer, num_microbatches)
    besides = {**output_figures(trainer), **ahead, **routing}
    stop, peak_memory = bool(stops > 0), int(memory_R.max())
    figures = StepFigures(losses, float(grad_norm), besides, loads, stop, peak_memory)
    if trainer.settings.training.check_for_nan_in_loss_and_grad:
        _refuse_non_finite(figures, local[0].sum())
    return figures


def output_figures(trainer: Trainer) -> dict[str, float]:
    """``output_z_loss`` since the last call (collective), if it has a coefficient: mean (log Z)^2.

    Over the tokens that count of the global batch, without the coefficient.
    """
    if trainer.settings.model.output_z_loss_coeff is None:
        return {}
    runtime = trainer.runtime
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for model in unwrap_model(trainer.chunks):
        noted = model.take_squared_log_z()
        sums += noted.to(sums.device) if runtime.holds_loss else 0
    torch.distributed.all_reduce(sums)
    total, tokens = sums.tolist()
    return {"output_z_loss": total / max(tokens, 1.0)}


def prediction_figures(trainer: Trainer, num_microbatches: int) -> dict[str, Any]:
    """Losses of multi-token prediction since the last call (collective); nothing without it.

    ``mtp_losses``: for each module the mean over micro-batches of its mean loss, without its weight
    (nats per token). megatron-core notes them on the ranks of the last stage.
    """
    modules = trainer.settings.model.mtp_num_layers
    if modules is None:
        return {}
    noted, runtime = MTPLossLoggingHelper.tracker, trainer.runtime
    sums = torch.zeros(modules + 1, dtype=torch.float64, device=runtime.device)
    if runtime.holds_loss:
        sums[:-1], sums[-1] = noted["values"], num_microbatches
    if "values" in noted:
        MTPLossLoggingHelper.clean_loss_in_tracker()
    torch.distributed.all_reduce(sums)
    return {"mtp_losses": (sums[:-1] / sums[-1]).tolist()}


def routing_figures(
    trainer: Trainer, num_microbatches: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What routers did since the last call, over all ranks (collective); nothing if dense.

    ``aux_loss`` and ``z_loss`` without their coefficients; ``expert_load_max_over_mean``, the load
    of a layer's busiest expert over the mean, averaged over layers, and ``expert_load``, the same
    for each layer; where experts have a capacity ``dropped_fraction`` of choices, over all layers,
    ``dropped_fractions``, by layer, and ``dropped_by_position``, by layer and part of the sequence.
    And beside these the ``loads`` of `StepFigures`.
    """
    if trainer.recorder is None:
        return {}, {}
    runtime, moe = trainer.runtime, trainer.settings.moe
    figures: dict[str, Any] = dict(
        read_auxiliary_losses(trainer.settings, num_microbatches, runtime.groups, runtime.device)
    )
    summary = trainer.recorder.summary()
    trainer.recorder.reset()
    figures["expert_load_max_over_mean"] = summary.load_max_over_mean
    chosen_LE = summary.chosen.double()  # [MoE layers, experts]
    loads_LE = (chosen_LE / chosen_LE.mean(1, keepdim=True)).numpy()
    names = [f"layer_{n}" for n, sparse in enumerate(routed_layers(trainer.settings)) if sparse]
    loads = dict(zip(names, loads_LE, strict=True))
    figures["expert_load"] = {name: float(load_E.max()) for name, load_E in loads.items()}
    if moe.moe_expert_capacity_factor is not None:
        figures["dropped_fraction"] = summary.dropped_fraction
        figures["dropped_fractions"] = dict(zip(names, summary.dropped_fractions, strict=True))
        figures["dropped_by_position"] = dict(zip(names, summary.dropped_by_position, strict=True))
    return figures, loads


def run_schedule(
    trainer: Trainer,
    batches: BatchIterators,
    num_microbatches: int,
    loss: Any,
    forward_only: bool = False,
) -> list[torch.Tensor]:
    """Run megatron-core's schedule for this layout; what ``loss`` reports of each micro-batch.

    ``loss(batch, losses_BS)`` returns (scalar to differentiate, number of tokens, report). The list
    is empty except on the last pipeline stage. Gradients lie in the chunks' buffers, reduced over
    all ranks, on return.
    """
    settings = trainer.settings
    forward_backward = get_forward_backward_func()
    reports: list[torch.Tensor] = forward_backward(
        forward_step_func=partial(_forward, trainer, loss),
        data_iterator=list(batches),
        model=list(trainer.chunks),
        num_microbatches=num_microbatches,
        seq_length=settings.model.seq_length,
        micro_batch_size=settings.training.micro_batch_size,
        forward_only=forward_only,
    )
    return reports


def _forward(
    trainer: Trainer, loss: Any, batches: Iterator[Batch] | None, chunk: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    """One chunk's forward pass over its next micro-batch, and the loss function of its output."""
    batch: Batch = {} if batches is None else next(batches)
    settings, runtime, mask = trainer.settings, trainer.runtime, None
    batch = {name: tensor.to(runtime.device, non_blocking=True) for name, tensor in batch.items()}
    per_sample = {name: batch.pop(name) for name in PER_SAMPLE if name in batch}
    if settings.data.bidirectional_prefix:
        mask = prefix_mask(per_sample["prefix"], settings.model.seq_length)
    batch = get_batch_on_this_cp_rank(batch, cp_group=runtime.groups.cp)
    names = ("labels", "loss_mask")  # the mask is for what the model makes of its own losses
    words = {name: batch.get(name) for name in names}
    output = chunk(batch.get("tokens"), batch.get("position_ids"), mask, **words)
    return output, partial(loss, {**batch, **per_sample})


def token_loss(
    tally: Tally, batch: Batch, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of one micro-batch on this rank, as megatron-core's schedules want it.

    L = sum_t m_t l_t, with l_t the loss of token t in nats and m_t its loss mask; not divided here:
    ``finalize_model_grads`` divides by the number of tokens of the global batch, or the schedule by
    that of the micro-batch, as --calculate-per-token-loss says. With context parallelism a rank
    holds its share of the sequence.

    Args:
        tally: counts for the log.
        batch: holds ``loss_mask`` float32 [b, s] and ``PER_SAMPLE``.
        losses_BS: losses float32 [b, s], equal on all tensor-parallel ranks.

    Returns:
        L (float32), the number of tokens (int32), and the tally's sums for the log.
    """
    mask_BS = batch["loss_mask"]
    total = (losses_BS * mask_BS).sum()
    return total, mask_BS.sum().to(torch.int), tally.count(batch, losses_BS)


def _refuse_non_finite(figures: StepFigures, local_loss: torch.Tensor) -> None:
    lm_loss = figures.losses.loss
    if math.isfinite(lm_loss) and math.isfinite(figures.grad_norm):
        return
    finite: list[bool] = [True] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(finite, bool(local_loss.isfinite()))
    ranks = [rank for rank, good in enumerate(finite) if not good]
    where = f" (loss of rank {', '.join(map(str, ranks))})" if ranks else ""
    raise NotFiniteError(f"lm_loss is {lm_loss}, the gradient norm {figures.grad_norm}{where}")
