"""One optimizer step: forward and backward over all micro-batches, clip, update.

What a rank holds: its pipeline stage's layers (one model chunk per virtual stage), sharded over
tensor ranks; the experts of its expert rank; its data rank's samples of the global batch, with
context parallelism its chunks of their positions. The last stage computes the loss, equal on all
its tensor ranks. Shape suffixes: B samples of a micro-batch, S positions on this rank, R ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model

from moetron.common.errors import RunError
from moetron.moe.host.allocator import peak_memory_bytes
from moetron.moe.layers.attention import prefix_mask
from moetron.moe.numerics.scaled_matmul import expire_weights
from moetron.moe.optim.update import clip_and_update, norm_of, prepare_gradients
from moetron.moe.training.batches import PER_SAMPLE, Batch
from moetron.moe.training.loss_tally import Tally
from moetron.moe.training.optimizer import set_learning_rate
from moetron.moe.training.step_metrics import LOADS, StepMetrics, read_all, recorded_metrics
from moetron.moe.training.trainer import Trainer

BatchIterators = Sequence[Iterator[Batch] | None]
"""Micro-batches for each model chunk of this rank; None for a chunk that needs no samples."""


class NotFiniteError(RunError):
    """A loss or gradient norm is infinite or NaN."""


def train_step(
    trainer: Trainer,
    batches: BatchIterators,
    num_microbatches: int,
    learning_rate: float,
    stop_requested: Callable[[], bool],
    tally: Tally,
) -> StepMetrics:
    """Run one step.

    Args:
        trainer: the model and its optimizer; both change.
        batches: iterators that yield this rank's next ``num_microbatches`` micro-batches.
        num_microbatches: micro-batches of every rank.
        learning_rate: of this step.
        stop_requested: returns whether this rank got a stop request; all ranks learn of it.
        tally: sums the losses by source and objective.

    Raises:
        NotFiniteError: the loss or the gradient norm is not finite and the settings check it; no
            weight has changed.
    """
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    # Gradients are reduced when this returns; see run_schedule for the collectives.
    reports = run_schedule(trainer, batches, num_microbatches, partial(token_loss, tally))
    squares = prepare_gradients(trainer.optimizer)
    local = _local_sums(trainer, tally, reports)
    metrics = _read(trainer, tally, local, squares, stop_requested(), num_microbatches)
    # All ranks see the same loss and norm, so either all of them update or all of them raise.
    _refuse_non_finite(trainer, metrics, local)
    set_learning_rate(trainer.optimizer, learning_rate)
    clip_and_update(trainer.optimizer, metrics.grad_norm)
    if trainer.settings.precision.fp8_format is not None:
        expire_weights(trainer.chunks)
    return metrics


def _local_sums(trainer: Trainer, tally: Tally, reports: list[torch.Tensor]) -> torch.Tensor:
    """Return the tally's sums of this rank."""
    local = tally.zeros(trainer.runtime.device)
    if trainer.runtime.holds_loss:  # one tensor rank of the last stage: nothing counts twice
        local += torch.stack(reports).sum(0)
    return local


def _read(
    trainer: Trainer,
    tally: Tally,
    local: torch.Tensor,
    squares: torch.Tensor,
    stop_requested: bool,
    num_microbatches: int,
) -> StepMetrics:
    """Read all of a step on the host, before the update, from all ranks.

    Losses are summed; a stop request of any rank counts; of peak memory the maximum does; the norm
    is reduced already. The device has then finished forward and backward passes, and is free
    until the update is launched: this is the step's only wait.
    """
    # One slot per rank, so that the sum over ranks keeps every rank's own value.
    memory_R = local.new_zeros(trainer.runtime.world_size)
    memory_R[trainer.runtime.rank] = peak_memory_bytes(trainer.runtime.device)
    stops = local.new_full((1,), stop_requested)
    recorded = recorded_metrics(trainer, num_microbatches)
    sums, stops, memory_R, *others, squares = read_all(
        [local, stops, memory_R, *(each.sums for each in recorded)], squares
    )
    extra: dict[str, Any] = {}
    for each, total in zip(recorded, others, strict=True):
        extra |= each.read(total)
    loads = extra.pop(LOADS, {})
    return StepMetrics(
        tally.read(sums),
        norm_of(squares.tolist()),
        extra,
        loads,
        bool(stops > 0),
        int(memory_R.max()),
    )


def run_schedule(
    trainer: Trainer,
    batches: BatchIterators,
    num_microbatches: int,
    loss: Any,
    forward_only: bool = False,
) -> list[torch.Tensor]:
    """Run megatron-core's schedule for this layout; return the reports of all micro-batches.

    ``loss(batch, losses_BS)`` returns (scalar to differentiate, number of tokens, report). The list
    is empty except on the last pipeline stage. On return the chunks' buffers hold reduced
    gradients.
    """
    settings = trainer.settings
    # Between stages: point-to-point sends of activations and their gradients over the pipeline
    # group. Inside a layer: tensor group (linear layers), context group (attention), expert group
    # (all-to-all of tokens). At the end `finalize_gradients` reduces gradients over data ranks.
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
    """Run a chunk's forward pass over its next micro-batch; return output and loss function."""
    batch: Batch = {} if batches is None else dict(next(batches))
    settings, runtime, mask = trainer.settings, trainer.runtime, None
    per_sample = {name: batch.pop(name) for name in PER_SAMPLE if name in batch}
    if settings.data.bidirectional_prefix:
        mask = prefix_mask(per_sample["prefix"], settings.model.seq_length)
    if batch:  # of full sequences: not split over context ranks yet
        unwrap_model(chunk).set_loss_tokens(batch["loss_mask"].sum())
        tokens_BS = batch["tokens"]
        places_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        batch["position_ids"] = places_S.expand_as(tokens_BS)
    # No communication: every context rank has read the full samples and takes its own chunks.
    batch = get_batch_on_this_cp_rank(batch, cp_group=runtime.groups.cp)
    # With labels the model returns losses; it needs the mask for rewards and the output z-loss.
    targets = {name: batch.get(name) for name in ("labels", "loss_mask")}
    output = chunk(batch.get("tokens"), batch.get("position_ids"), mask, **targets)
    return output, partial(loss, {**batch, **per_sample})


def token_loss(
    tally: Tally, batch: Batch, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of one micro-batch on this rank for megatron-core's schedules.

    L = sum_t m_t l_t, with l_t the loss of token t in nats and m_t its loss mask. Not divided here:
    with --calculate-per-token-loss ``finalize_model_grads`` divides by the number of loss tokens of
    the global batch, otherwise the schedule by that of the micro-batch. With context parallelism a
    rank holds its own positions.

    Args:
        tally: sums for the metrics.
        batch: holds ``loss_mask`` float32 [b, s] and ``PER_SAMPLE``.
        losses_BS: losses float32 [b, s], equal on all tensor-parallel ranks.

    Returns:
        L (float32), the number of loss tokens (int32), and the tally's sums.
    """
    mask_BS = batch["loss_mask"]
    total = (losses_BS * mask_BS).sum()
    return total, mask_BS.sum().to(torch.int), tally.count(batch, losses_BS)


def _refuse_non_finite(trainer: Trainer, metrics: StepMetrics, local: torch.Tensor) -> None:
    """Raise NotFiniteError on all ranks, if the settings check the loss and gradient norm."""
    if not trainer.settings.training.check_for_nan_in_loss_and_grad:
        return
    lm_loss, grad_norm = metrics.losses.loss, metrics.grad_norm
    if math.isfinite(lm_loss) and math.isfinite(grad_norm):
        return
    finite: list[bool] = [True] * torch.distributed.get_world_size()
    # All-gather over all ranks, only before the error: the message names the failing ranks.
    torch.distributed.all_gather_object(finite, bool(local[0].sum().isfinite()))
    ranks = [rank for rank, good in enumerate(finite) if not good]
    where = f" (loss of rank {', '.join(map(str, ranks))})" if ranks else ""
    raise NotFiniteError(f"lm_loss is {lm_loss}, the gradient norm {grad_norm}{where}")
