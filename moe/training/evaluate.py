"""Validation loss on fixed samples, each used once in any layout."""

import math
from dataclasses import dataclass
from functools import partial

import torch

from moetron.common.watch import activity
from moetron.moe.config.schema.pipeline_split import virtual_pipeline_size
from moetron.moe.training.batches import Batch, micro_batch_numbers, micro_batches
from moetron.moe.training.loss_tally import Losses, Tally
from moetron.moe.training.model_chunks import needs_samples, parameters_gathered, set_training
from moetron.moe.training.sample_stream import SampleStream
from moetron.moe.training.step import run_schedule
from moetron.moe.training.trainer import Trainer


@activity.doing("evaluation")
def evaluate(trainer: Trainer, stream: SampleStream) -> Losses:
    """Return the losses of --eval-iters global batches of ``stream``, or of all its samples.

    Samples are 0, 1, ...; ranks without a sample left get padding, which has no loss. Collective
    over all ranks.
    """
    settings, runtime, tally = trainer.settings, trainer.runtime, Tally(stream)
    micro_batch_size = settings.training.micro_batch_size
    count = min(settings.validation.eval_iters * settings.training.global_batch_size, len(stream))
    stride = micro_batch_size * runtime.dp_size
    if virtual_pipeline_size(settings) is not None:
        stride *= runtime.groups.pp.size()  # interleaving needs a multiple of the stages
    padded = -(-count // stride) * stride
    numbers = list(
        micro_batch_numbers(0, count, micro_batch_size, runtime.dp_rank, runtime.dp_size, padded)
    )
    batches = [
        micro_batches(stream, settings.model.seq_length, numbers, device=runtime.device)
        if needs_samples(chunk, settings)
        else None
        for chunk in trainer.chunks
    ]
    set_training(trainer.chunks, False)
    with parameters_gathered(trainer.chunks, settings), torch.no_grad():
        loss = partial(_report, tally)
        reports = run_schedule(trainer, batches, len(numbers), loss, forward_only=True)
    set_training(trainer.chunks, True)
    total = tally.zeros(runtime.device)
    if runtime.holds_loss:
        total += torch.stack(reports).sum(0)
    # All-reduce over all ranks: last-stage ranks hold the sums of their own samples or positions,
    # the others zeros. All ranks need the result.
    torch.distributed.all_reduce(total)
    return tally.read(total)


def _report(
    tally: Tally, batch: Batch, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (0, 0, the sums of one micro-batch)."""
    nothing = losses_BS.new_zeros(())
    return nothing, nothing.int(), tally.count(batch, losses_BS)


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
