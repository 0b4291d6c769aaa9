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
from megatron.core.utils import unwrap_model
from torch.distributed import ProcessGroup

from moetron.common.watch import activity
from moetron.moe.config.schema.settings import Settings
from moetron.moe.health.monitor import HealthMonitor
from moetron.moe.health.spikes import StepValues
from moetron.moe.host.allocator import peak_memory_bytes
from moetron.moe.host.context_parallel import own_chunks
from moetron.moe.layers.attention import prefix_mask
from moetron.moe.layers.document_attention import packed_parameters, places_in_documents
from moetron.moe.layers.language_model import LanguageModel
from moetron.moe.numerics.scaled_matmul import expire_weights
from moetron.moe.optim.update import clip_and_update, norm_of, prepare_gradients
from moetron.moe.preference.kto_losses import baseline_of, kto_losses
from moetron.moe.preference.pair_losses import Preference, conversation_log_probs, pair_losses
from moetron.moe.training.batches import (
    BY_CONVERSATION,
    PER_SAMPLE,
    Batch,
    Replay,
    matched,
    mismatched,
)
from moetron.moe.training.loss_tally import Losses, Tally
from moetron.moe.training.model_chunks import parameters_gathered, set_training
from moetron.moe.training.optimizer import scale_rows, set_learning_rate
from moetron.moe.training.step_metrics import (
    BIAS_RANGES,
    LOADS,
    StepMetrics,
    read_all,
    recorded_metrics,
)
from moetron.moe.training.trainer import Trainer

BatchIterators = Sequence[Iterator[Batch] | None]
"""Micro-batches for each model chunk of this rank; None for a chunk that needs no samples."""


def train_step(
    trainer: Trainer,
    batches: BatchIterators,
    num_microbatches: int,
    learning_rate: float,
    stop_requested: Callable[[], bool],
    tally: Tally,
    health: HealthMonitor,
) -> StepMetrics:
    """Run one step.

    Args:
        trainer: the model and its optimizer; both change.
        batches: iterators that yield this rank's next ``num_microbatches`` micro-batches.
        num_microbatches: micro-batches of every rank.
        learning_rate: of this step.
        stop_requested: returns whether this rank got a stop request; all ranks learn of it.
        tally: sums the losses by source and objective.
        health: decides whether the passes are run again and whether the weights are updated; its
            ``verdict``, or ``reruns.ending``, says what follows.
    """
    replays = [each for each in batches if isinstance(each, Replay)]
    for replay in replays:
        replay.forget()
    while True:
        metrics = _passes(trainer, batches, num_microbatches, stop_requested(), tally, health)
        if not health.runs_again(metrics.values):
            break
        activity.begin(activity.STEP, activity.current().step)  # as long as a step may last
        for replay in replays:
            replay.rewind()
    if health.reruns.ending is not None:
        return metrics
    # All ranks see the same values, also each other's, so that all of them decide the same.
    if health.judge(metrics.values, metrics.loads, metrics.bias_ranges).updates:
        set_learning_rate(trainer.optimizer, learning_rate)
        clip_and_update(trainer.optimizer, metrics.grad_norm)
        if trainer.logits is not None and trainer.settings.attention.qk_clip:
            scale_rows(trainer.optimizer, trainer.logits.factors())
        if trainer.settings.precision.fp8_format is not None:
            expire_weights(trainer.chunks)
    return metrics


def _passes(
    trainer: Trainer,
    batches: BatchIterators,
    num_microbatches: int,
    stop_requested: bool,
    tally: Tally,
    health: HealthMonitor,
) -> StepMetrics:
    """Run forward and backward passes over all micro-batches; return what they gave."""
    baseline = None
    if has_baseline(trainer.settings):
        baseline = kto_baseline(trainer, batches, num_microbatches)
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    if trainer.logits is not None:
        trainer.logits.reset()
    # Gradients are reduced when this returns; see run_schedule for the collectives.
    loss = partial(loss_function(trainer, baseline), tally)
    reports = run_schedule(trainer, batches, num_microbatches, loss)
    squares = prepare_gradients(trainer.optimizer)
    local = _local_sums(trainer, tally, reports)
    own_square = health.gradients.take()
    return _read(trainer, tally, local, squares, own_square, stop_requested, num_microbatches)


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
    own_square: torch.Tensor | None,
    stop_requested: bool,
    num_microbatches: int,
) -> StepMetrics:
    """Read all of a step on the host, before the update, from all ranks.

    Losses are summed; a stop request of any rank counts; of peak memory the maximum does, and of
    the norm, which is reduced already: ranks whose reductions differ in the last bit clip alike.
    The device has then finished forward and backward passes, and is free until the update is
    launched: this is the step's only wait.
    """
    # One row per rank, so that the sum over ranks keeps every rank's own values.
    rows_RK = local.new_zeros(trainer.runtime.world_size, OWN + len(squares))
    mine_K = rows_RK[trainer.runtime.rank]
    mine_K[0] = peak_memory_bytes(trainer.runtime.device)
    mine_K[1:3] = tally.trained(local)
    if own_square is not None:
        mine_K[3] = own_square
    mine_K[OWN:] = squares
    stops = local.new_full((1,), stop_requested)
    recorded = recorded_metrics(trainer, num_microbatches)
    sums, stops, rows_RK, *others = read_all(
        [local, stops, rows_RK, *(each.sums for each in recorded)]
    )
    extra: dict[str, Any] = {}
    for each, total in zip(recorded, others, strict=True):
        extra |= each.read(total)
    loads, bias_ranges = extra.pop(LOADS, {}), extra.pop(BIAS_RANGES, {})
    losses = tally.read(sums)
    values = _values(losses, rows_RK.tolist(), own_square is not None)
    return StepMetrics(
        losses,
        values.grad_norm,
        values,
        extra,
        loads,
        bias_ranges,
        bool(stops > 0),
        int(rows_RK[:, 0].max()),
    )


OWN = 4
"""Values of a rank before those of the norm: peak memory, sum of losses, what it is divided by,
squared norm of its own gradients."""


def _values(losses: Losses, rows_RK: Sequence[Sequence[float]], measured: bool) -> StepValues:
    """Return the values that decide about the update; rows as in `_read`."""
    norms = [norm_of(row[OWN:]) for row in rows_RK]
    name, loss = losses.objective
    return StepValues(
        loss,
        next((norm for norm in norms if not math.isfinite(norm)), max(norms)),
        [total / count if count else None for _, total, count, *_ in rows_RK],
        [math.sqrt(square) for _, _, _, square, *_ in rows_RK] if measured else [],
        losses.by_source,
        name,
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
    trainer: Trainer,
    loss: Any,
    batches: Iterator[Batch] | None,
    chunk: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, Any]:
    """Run a chunk's forward pass over its next micro-batch; return output and loss function.

    ``return_schedule_plan``: return the parts of the pass in place of its output; megatron-core's
    combined schedule runs them, interleaved with those of another micro-batch's backward pass.
    """
    batch: Batch = {} if batches is None else matched(next(batches))
    settings, runtime, mask = trainer.settings, trainer.runtime, None
    kept = (*PER_SAMPLE, *BY_CONVERSATION)
    per_sample = {name: batch.pop(name) for name in kept if name in batch}
    options: dict[str, Any] = {}
    if settings.data.bidirectional_prefix:
        mask = prefix_mask(per_sample["prefix"], settings.model.seq_length)
    if batch:  # of full sequences: not split over context ranks yet
        model = unwrap_model(chunk)
        weights = per_sample.get("examples", batch.get("loss_count", batch["loss_mask"]))
        model.set_loss_tokens(weights.sum())
        tokens_BS = batch["tokens"]
        places_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        batch["position_ids"] = places_S.expand_as(tokens_BS)
        if (cu_seqlens := batch.pop("cu_seqlens", None)) is not None:
            mask = _separate_documents(model, batch, cu_seqlens, options)
        if (padding_B := batch.pop("padding", None)) is not None:
            batch["padding"] = places_S >= len(places_S) - padding_B[:, None]
    # No communication: every context rank has read the full samples and takes its own chunks.
    batch = {name: own_chunks(whole, 1, runtime.groups.cp) for name, whole in batch.items()}
    if batch:
        model.set_padding(batch.pop("padding", None))
    # With labels the model returns losses; it needs the mask for rewards and the output z-loss.
    names = ("labels", "loss_mask", "prediction_mask", "segments")
    options |= {name: batch[name] for name in names if name in batch}
    run = unwrap_model(chunk).build_schedule_plan if return_schedule_plan else chunk
    output = run(batch.get("tokens"), batch.get("position_ids"), mask, **options)
    return output, partial(loss, {**batch, **per_sample})


def _separate_documents(
    model: LanguageModel, batch: Batch, cu_seqlens: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor | None:
    """Restart positions in ``batch`` and mask multi-token prediction at documents' starts.

    Returns the attention mask of local layers; Transformer Engine's get ``options`` instead.
    """
    places_BS = places_in_documents(cu_seqlens, *batch["tokens"].shape)
    batch["position_ids"] = places_BS
    if model.config.mtp_num_layers is not None:
        weight_BS = batch.get("loss_weight", batch["loss_mask"])
        batch["prediction_mask"] = weight_BS * (places_BS > 0)
    if model.takes_packed_sequences:
        options["packed_seq_params"] = packed_parameters(cu_seqlens, places_BS.shape[1])
        return None
    return cu_seqlens


def forward_only(
    trainer: Trainer, batches: BatchIterators, count: int, loss: Any
) -> list[torch.Tensor]:
    """Run forward passes over ``count`` micro-batches in evaluation mode; return the reports."""
    set_training(trainer.chunks, False)
    with parameters_gathered(trainer.chunks, trainer.settings), torch.no_grad():
        reports = run_schedule(trainer, batches, count, loss, forward_only=True)
    set_training(trainer.chunks, True)
    return reports


def has_baseline(settings: Settings) -> bool:
    """Return whether the loss has a baseline, from mismatched samples."""
    return settings.adaptation.preference_loss == "kto"


def kto_baseline(trainer: Trainer, batches: BatchIterators, count: int) -> torch.Tensor:
    """Return KTO's baseline over ``count`` micro-batches; those of a `Replay` are rewound.

    Equal on all ranks of the last stage, and without a use on the others.
    """
    group, none = trainer.runtime.groups.cp, torch.zeros(2, device=trainer.runtime.device)

    def differences(batch: Batch, losses_BS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        log_probs_BD, _ = conversation_log_probs(batch, losses_BS, group)
        used_BD = batch["numbers"] >= 0
        total = torch.where(used_BD, log_probs_BD - batch["reference"], 0.0).double().sum()
        nothing = losses_BS.new_zeros(())
        return nothing, nothing.int(), torch.stack([total, used_BD.sum().double()])

    others = [None if each is None else map(mismatched, each) for each in batches]
    reports = forward_only(trainer, others, count, differences)
    for each in batches:
        if isinstance(each, Replay):
            each.rewind()
    sums = torch.stack(reports).sum(0) if reports else none.double()
    # All-reduce over the data-parallel group: its ranks hold the other samples of the global batch.
    # Context and tensor ranks have the same sums already.
    torch.distributed.all_reduce(sums, group=trainer.runtime.groups.dp)
    return baseline_of(*sums)


def loss_function(
    trainer: Trainer, baseline: torch.Tensor | None
) -> Callable[[Tally, Batch, torch.Tensor], Any]:
    """Return the loss of a micro-batch: of tokens, of pairs, or with a baseline of examples."""
    chosen = trainer.settings.adaptation
    if chosen.preference_loss is None:
        return token_loss
    preference = Preference(
        chosen.preference_loss,
        chosen.preference_beta,
        chosen.preference_label_smoothing,
        chosen.preference_desirable_weight,
        chosen.preference_undesirable_weight,
    )
    return partial(preference_loss, preference, trainer.runtime.groups.cp, baseline)


def preference_loss(
    preference: Preference,
    group: ProcessGroup,
    baseline: torch.Tensor | None,
    tally: Tally,
    batch: Batch,
    losses_BS: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum of the losses of a micro-batch, the number of examples and the tally's sums.

    Context ranks compute the same losses; one of them counts them. Arguments as of `token_loss`,
    and ``group``, the context-parallel ranks. ``baseline`` is KTO's.
    """
    log_probs_BD, tokens_BD = conversation_log_probs(batch, losses_BS, group)
    reference_BD, examples_B = batch["reference"], batch["examples"]
    if baseline is None:
        values = pair_losses(log_probs_BD, reference_BD, tokens_BD, examples_B, preference)
    else:
        wanted_BD = batch["wanted"]
        values = kto_losses(log_probs_BD, reference_BD, wanted_BD, examples_B, baseline, preference)
    count = examples_B.sum() * (group.rank() == 0)
    sums = tally.count(batch, losses_BS)
    if group.rank() == 0:
        tally.count_preferences(sums, values, count)
    return values[0].sum(), count.to(torch.int), sums


def token_loss(
    tally: Tally, batch: Batch, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of one micro-batch on this rank for megatron-core's schedules.

    L = sum_t w_t l_t, with l_t the loss of token t in nats and w_t its loss mask, or its weight if
    the samples have weights (1 / loss tokens of its conversation). Not divided here: with
    --calculate-per-token-loss ``finalize_gradients`` divides by the number of loss tokens (or of
    conversations) of the global batch, otherwise the schedule by that of the micro-batch. With
    context parallelism a rank holds its own positions.

    Args:
        tally: sums for the metrics.
        batch: holds ``loss_mask`` float32 [b, s] and ``PER_SAMPLE``, perhaps ``WEIGHTS``.
        losses_BS: losses float32 [b, s], equal on all tensor-parallel ranks.

    Returns:
        L (float32), the number of loss tokens or conversations (int32), and the tally's sums.
    """
    mask_BS = batch["loss_mask"]
    total = (losses_BS * batch.get("loss_weight", mask_BS)).sum()
    count = batch.get("loss_count", mask_BS).sum()
    return total, count.to(torch.int), tally.count(batch, losses_BS)
