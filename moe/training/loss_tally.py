"""Losses by source and by objective, exact per token.

Shape suffixes: B samples of a micro-batch, S positions on this rank.
"""

from dataclasses import dataclass, field

import torch

from moetron.moe.preference.pair_losses import METRICS
from moetron.moe.training.batches import Batch
from moetron.moe.training.sample_stream import SampleStream

_PAIR_COLUMNS = 2


@dataclass(frozen=True)
class Losses:
    """Language-model losses over all ranks, in nats per token."""

    loss: float
    """Sum of the losses of all loss tokens, divided by their number."""
    tokens: int
    """Loss tokens."""
    by_source: dict[str, float]
    """The same for each source with tokens."""
    by_objective: dict[str, float]
    tokens_by_source: dict[str, int]
    filtered_tokens: int
    """Tokens of samples whose loss is masked because of repetition."""
    preferences: dict[str, float] = field(default_factory=dict)
    """Means over pairs of the `METRICS` of pair_losses.py; empty without them."""


class Tally:
    """Sums in float64 [3, sources + objectives + 2]: losses, loss tokens, filtered tokens.

    The last two columns hold the metrics of pairs and their number.

    Every sample counts in the column of its source and in that of its objective. A rank holds the
    sums of its samples or, with context parallelism, of its positions; only ranks with
    ``Runtime.holds_loss`` contribute, so that the sum over all ranks is that of the global batch.
    """

    def __init__(self, stream: SampleStream) -> None:
        self.source_names, self._objectives = stream.source_names, stream.objective_names

    def zeros(self, device: torch.device) -> torch.Tensor:
        """Return zero sums."""
        columns = len(self.source_names) + len(self._objectives) + _PAIR_COLUMNS
        return torch.zeros(3, columns, dtype=torch.float64, device=device)

    def count(self, batch: Batch, losses_BS: torch.Tensor) -> torch.Tensor:
        """Return the sums of one micro-batch; ``losses_BS`` are this rank's, float32 [b, s]."""
        mask_BS = batch["loss_mask"].double()
        filtered_B = batch["filtered"].double() * losses_BS.shape[1]
        rows_3B = torch.stack([(losses_BS.detach() * mask_BS).sum(1), mask_BS.sum(1), filtered_B])
        sums = self.zeros(losses_BS.device)
        sums.index_add_(1, batch["source"], rows_3B)
        sums.index_add_(1, batch["objective"] + len(self.source_names), rows_3B)
        return sums

    def count_pairs(
        self, sums: torch.Tensor, values_5BP: torch.Tensor, pairs: torch.Tensor
    ) -> None:
        """Add the metrics of a micro-batch's pairs, and their number, to ``sums``."""
        totals = torch.cat([values_5BP.detach().sum((1, 2)), pairs[None]])
        sums[:, -_PAIR_COLUMNS:] += totals.view(_PAIR_COLUMNS, 3).T

    def read(self, sums: torch.Tensor) -> Losses:
        """Return the losses for sums over all ranks."""
        count, sums = len(self.source_names), sums.cpu()
        losses, tokens, filtered = sums[:, :count].sum(1).tolist()
        by_source = _means(self.source_names, sums[:, :count])
        source_tokens = sums[1, :count].long().tolist()
        return Losses(
            losses / max(tokens, 1.0),
            int(tokens),
            by_source,
            _means(self._objectives, sums[:, count : count + len(self._objectives)]),
            {name: n for name, n in zip(self.source_names, source_tokens, strict=True) if n},
            int(filtered),
            _pair_means(sums[:, -_PAIR_COLUMNS:]),
        )


def _pair_means(columns: torch.Tensor) -> dict[str, float]:
    *totals, pairs = columns.T.flatten().tolist()
    return {n: total / pairs for n, total in zip(METRICS, totals, strict=True)} if pairs else {}


def _means(names: list[str], sums: torch.Tensor) -> dict[str, float]:
    """Return the loss per token of each column of [3, N] that has tokens."""
    losses, tokens, _ = sums.tolist()
    return {n: loss / count for n, loss, count in zip(names, losses, tokens, strict=True) if count}
