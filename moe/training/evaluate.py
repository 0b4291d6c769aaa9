"""The loss on fixed validation samples: every one of them once, whatever the layout."""

import math
from dataclasses import dataclass
from functools import partial

import torch

from moetron.moe.config.schema.pipeline_split import virtual_pipeline_size
from moetron.moe.training.batches import Batch, micro_batch_numbers, micro_batches
from moetron.moe.training.loss_tally import Losses, Tally
from moetron.moe.training.model_chunks import needs_samples, set_training, settled
from moetron.moe.training.sample_stream import SampleStream
from moetron.moe.training.step import run_schedule
from moetron.moe.training.trainer import Trainer


def evaluate(trainer: Trainer, stream: SampleStream) -> Losses:
    """Evaluate the samples 0, 1, ... of ``stream``: --eval-iters global batches, or all there are.

    Ranks without a sample left take padding, which counts for nothing.
    """
    settings, runtime, tally = trainer.settings, trainer.runtime, Tally(stream)
    micro_batch_size = settings.training.micro_batch_size
    count = min(settings.validation.eval_iters * settings.training.global_batch_size, len(stream))
    stride = micro_batch_size * runtime.dp_size
    if virtual_pipeline_size(settings) is not None:
        stride *= runtime.groups.pp.size()  # interleaving takes micro-batches by that many
    padded = -(-count // stride) * stride
    numbers = list(
        micro_batch_numbers(0, count, micro_batch_size, runtime.dp_rank, runtime.dp_size, padded)
    )
    batches = [
        micro_batches(stream, settings.model.seq_length, numbers)
        if needs_samples(chunk, settings)
        else None
        for chunk in trainer.chunks
    ]
    set_training(trainer.chunks, False)
    with settled(trainer.chunks, settings), torch.no_grad():
        loss = partial(_report, tally)
        reports = run_schedule(trainer, batches, len(numbers), loss, forward_only=True)
    set_training(trainer.chunks, True)
    total = tally.zeros(runtime.device)
    if runtime.holds_loss:
        total += torch.stack(reports).sum(0)
    torch.distributed.all_reduce(total)
    return tally.read(total)


def _report(
    tally: Tally, batch: Batch, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(0, 0, the sums of one micro-batch)."""
    nothing = losses_BS.new_zeros(())
    return nothing, nothing.int(), tally.count(batch, losses_BS)


@dataclass(frozen=True)
class BitsPerByte:
    """Losses that tokenizers have no part in."""

    all: float
    """Of the text of all sources together."""
    by_source: dict[str, float]


def bits_per_byte(losses: Losses, stream: SampleStream) -> BitsPerByte | None:
    """Losses in bits per byte of UTF-8 text: nats per token / (ln 2 x bytes per token).

    A token counts as its source's mean number of bytes, end-of-document tokens as part of the text.
    None unless that is known of all sources that were evaluated.
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
