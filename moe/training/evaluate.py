"""The loss on fixed validation samples: every one of them once, whatever the layout."""

from dataclasses import dataclass
from functools import partial

import torch

from moetron.moe.training.batches import Batch, micro_batch_numbers, micro_batches
from moetron.moe.training.model import needs_samples, set_training, settled
from moetron.moe.training.step import Trainer, run_schedule
from moetron.moe.training.stream import SampleStream


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats per token, of the language model alone."""

    loss: float
    """Sum of the losses of all tokens that count, divided by their number."""
    source_losses: dict[str, float]
    """The same for each source that the samples came from."""
    tokens: int
    """Tokens that count."""


def evaluate(trainer: Trainer, stream: SampleStream) -> Evaluation:
    """Evaluate the samples 0, 1, ... of ``stream``: --eval-iters global batches, or all there are.

    Ranks without a sample left take padding, which counts for nothing.
    """
    settings, runtime = trainer.settings, trainer.runtime
    micro_batch_size = settings.training.micro_batch_size
    count = min(settings.validation.eval_iters * settings.training.global_batch_size, len(stream))
    stride = micro_batch_size * runtime.dp_size
    if settings.parallel.num_layers_per_virtual_pipeline_stage is not None:
        stride *= runtime.groups.pp.size()  # interleaving takes micro-batches by that many
    padded = -(-count // stride) * stride
    numbers = list(
        micro_batch_numbers(0, count, micro_batch_size, runtime.dp_rank, runtime.dp_size, padded)
    )
    batches = [
        micro_batches(stream, settings.model.seq_length, numbers) if needs_samples(chunk) else None
        for chunk in trainer.chunks
    ]
    set_training(trainer.chunks, False)
    with settled(trainer.chunks, settings), torch.no_grad():
        report = partial(_source_sums, len(stream.source_names))
        sums = run_schedule(trainer, batches, len(numbers), report, forward_only=True)
    set_training(trainer.chunks, True)
    return _reduced(trainer, sums, stream.source_names)


def _source_sums(
    sources: int, batch: Batch, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(0, 0, [2, sources]): losses and tokens of one micro-batch, float64, by source."""
    mask_BS = batch["loss_mask"].double()
    sums = torch.zeros(2, sources, dtype=torch.float64, device=losses_BS.device)
    sums[0].index_add_(0, batch["source"], (losses_BS * mask_BS).sum(1))
    sums[1].index_add_(0, batch["source"], mask_BS.sum(1))
    nothing = losses_BS.new_zeros(())
    return nothing, nothing.int(), sums


def _reduced(trainer: Trainer, sums: list[torch.Tensor], names: list[str]) -> Evaluation:
    total = torch.zeros(2, len(names), dtype=torch.float64, device=trainer.runtime.device)
    if trainer.runtime.holds_loss:
        total += torch.stack(sums).sum(0)
    torch.distributed.all_reduce(total)
    losses, tokens = total.tolist()
    by_source = {
        name: loss / count for name, loss, count in zip(names, losses, tokens, strict=True) if count
    }
    return Evaluation(sum(losses) / max(sum(tokens), 1.0), by_source, int(sum(tokens)))
