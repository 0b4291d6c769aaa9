"""Validation loss on fixed samples, each used once in any layout."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from moetron.common.watch import activity
from moetron.moe.config.schema.pipeline_split import virtual_pipeline_size
from moetron.moe.training.batches import (
    Batch,
    matched,
    micro_batch_numbers,
    micro_batches,
    mismatched,
)
from moetron.moe.training.loss_tally import Losses, Tally
from moetron.moe.training.model_chunks import needs_samples
from moetron.moe.training.sample_stream import PreferenceStream, SampleStream
from moetron.moe.training.step import forward_only, has_baseline, kto_baseline, loss_function
from moetron.moe.training.trainer import Trainer


@activity.doing("evaluation")
def evaluate(trainer: Trainer, stream: SampleStream) -> Losses:
    """Return the losses of --eval-iters global batches of ``stream``, or of all its samples.

    Samples are 0, 1, ...; ranks without a sample left get padding, which has no loss. Collective
    over all ranks.
    """
    settings, runtime = trainer.settings, trainer.runtime
    tally = Tally(stream, settings.adaptation.preference_loss)
    micro_batch_size = settings.training.micro_batch_size
    count = min(settings.validation.eval_iters * settings.training.global_batch_size, len(stream))
    stride = micro_batch_size * runtime.dp_size
    if virtual_pipeline_size(settings) is not None:
        stride *= runtime.groups.pp.size()  # interleaving needs a multiple of the stages
    padded = -(-count // stride) * stride
    numbers = list(
        micro_batch_numbers(0, count, micro_batch_size, runtime.dp_rank, runtime.dp_size, padded)
    )

    def batches() -> list[Iterator[Batch] | None]:
        return [
            micro_batches(stream, settings.model.seq_length, numbers, device=runtime.device)
            if needs_samples(chunk, settings)
            else None
            for chunk in trainer.chunks
        ]

    count = len(numbers)
    baseline = kto_baseline(trainer, batches(), count) if has_baseline(settings) else None
    report = partial(_report, loss_function(trainer, baseline), tally)
    reports = forward_only(trainer, batches(), count, report)
    total = tally.zeros(runtime.device)
    if runtime.holds_loss:
        total += torch.stack(reports).sum(0)
    # All-reduce over all ranks: last-stage ranks hold the sums of their own samples or positions,
    # the others zeros. All ranks need the result.
    torch.distributed.all_reduce(total)
    return tally.read(total)


def _report(
    loss: Callable[[Tally, Batch, torch.Tensor], Any],
    tally: Tally,
    batch: Batch,
    losses_BS: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (0, 0, the sums of one micro-batch)."""
    nothing = losses_BS.new_zeros(())
    _, _, sums = loss(tally, batch, losses_BS)
    return nothing, nothing.int(), sums


@activity.doing("reference")
def reference_log_probs(trainer: Trainer, stream: PreferenceStream) -> np.ndarray:
    """Return the log-probability of each conversation under the current weights: float32 [N].

    In the micro-batches of training's first epoch, so that the first steps see the same bits. No
    second copy of the model is held. KTO's mismatched samples are passes of their own, as in
    training. Collective over all ranks.
    """
    settings, runtime = trainer.settings, trainer.runtime
    size, count = settings.training.micro_batch_size, stream.rows_per_epoch
    stride = size * runtime.dp_size
    if virtual_pipeline_size(settings) is not None:
        stride *= runtime.groups.pp.size()
    padded = -(-count // stride) * stride
    numbers = list(micro_batch_numbers(0, count, size, runtime.dp_rank, runtime.dp_size, padded))
    found = torch.zeros(stream.conversation_count, dtype=torch.float64, device=runtime.device)

    def collect(batch: Batch, losses_BS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Of this context rank's positions: the all-reduce below adds the others'.
        length = batch["reference"].shape[1]
        own = (-losses_BS * batch["loss_mask"]).new_zeros(len(losses_BS), length)
        own = own.scatter_add(1, batch["conversation"], -losses_BS * batch["loss_mask"])
        used = batch["numbers"] >= 0
        if runtime.holds_loss:
            found.index_add_(0, batch["numbers"][used], own[used].double())
        nothing = losses_BS.new_zeros(())
        return nothing, nothing.int(), nothing

    for part in [matched, mismatched] if has_baseline(settings) else [matched]:
        batches = [
            map(part, micro_batches(stream, settings.model.seq_length, numbers, 0, runtime.device))
            for _ in trainer.chunks
        ]
        forward_only(trainer, batches, len(numbers), collect)
    # All-reduce over all ranks: each last-stage rank holds the sums of its samples and positions.
    torch.distributed.all_reduce(found)
    return found.float().cpu().numpy()


@dataclass(frozen=True)
class BitsPerByte:
    """Tokenizer-independent losses."""

    all: float
    """Over the text of all sources."""
    by_source: dict[str, float]


def bits_per_byte(losses: Losses, stream: SampleStream) -> BitsPerByte | None:
    """Return losses in bits per byte of UTF-8 text: nats per token / (ln 2 x bytes per token).

    Bytes per token are the mean of the source, with end-of-document tokens as text. None unless
    they are known for all evaluated sources.
    """
    widths = dict(zip(stream.source_names, stream.bytes_per_token, strict=True))
    bits, size = {}, {}
    for name, loss in losses.by_source.items():
        width = widths[name]
        if width is None:
            return None
        tokens = losses.tokens_by_source[name]
        bits[name], size[name] = loss * tokens / math.log(2), width * tokens
    if not size:
        return None
    by_source = {name: bits[name] / size[name] for name in bits}
    return BitsPerByte(sum(bits.values()) / sum(size.values()), by_source)
