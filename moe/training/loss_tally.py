"""Losses by source and by objective, exact per token.

Shape suffixes: B samples of a micro-batch, S positions on this rank.
"""

from dataclasses import dataclass, field

import torch

from moetron.moe.preference.pair_losses import SUMS, PreferenceLoss
from moetron.moe.training.batches import Batch
from moetron.moe.training.sample_stream import SampleStream

_PREFERENCE_COLUMNS = 3
"""3 x 3 values: `SUMS`, the number of pairs or examples, and one unused."""


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
    """See `_preference_means`; empty without them."""

    @property
    def objective(self) -> tuple[str, float]:
        """Return name and value of the loss that is trained."""
        if "preference_loss" in self.preferences:
            return "preference_loss", self.preferences["preference_loss"]
        return "lm_loss", self.loss


class Tally:
    """Sums in float64 [3, sources + objectives + 3]: losses, loss tokens, filtered tokens.

    The last three columns hold the metrics of preferences.

    Every sample counts in the column of its source and in that of its objective. A rank holds the
    sums of its samples or, with context parallelism, of its positions; only ranks with
    ``Runtime.holds_loss`` contribute, so that the sum over all ranks is that of the global batch.
    """

    def __init__(self, stream: SampleStream, preference: PreferenceLoss | None = None) -> None:
        self._preference = preference
        self.source_names, self._objectives = stream.source_names, stream.objective_names

    def zeros(self, device: torch.device) -> torch.Tensor:
        """Return zero sums."""
        columns = len(self.source_names) + len(self._objectives) + _PREFERENCE_COLUMNS
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

    def count_preferences(
        self, sums: torch.Tensor, values_7BP: torch.Tensor, count: torch.Tensor
    ) -> None:
        """Add the metrics of a micro-batch's pairs or examples, and their number, to ``sums``."""
        totals = torch.cat([values_7BP.detach().sum((1, 2)), count[None], count.new_zeros(1)])
        sums[:, -_PREFERENCE_COLUMNS:] += totals.view(_PREFERENCE_COLUMNS, 3).T

    def trained(self, sums: torch.Tensor) -> torch.Tensor:
        """Return the sum of the loss that is trained, and what it is divided by: [2]."""
        if self._preference is None:
            return sums[:2, : len(self.source_names)].sum(1)
        values = sums[:, -_PREFERENCE_COLUMNS:].T.flatten()
        return torch.stack([values[0], values[len(SUMS)]])

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
            {}
            if self._preference is None
            else _preference_means(sums[:, -_PREFERENCE_COLUMNS:], self._preference),
        )


def _preference_means(columns: torch.Tensor, kind: PreferenceLoss) -> dict[str, float]:
    """Return the mean loss and accuracy, the mean rewards of both kinds and their difference.

    Of KTO also ``kl``, its baseline. Absent: means over nothing.
    """
    *totals, count, _ = columns.T.flatten().tolist()
    sums = dict(zip(SUMS, totals, strict=True))
    if not count:
        return {}
    means = {"preference_loss": sums["loss"] / count, "accuracy": sums["accuracy"] / count}
    if sums["chosen"]:
        means["chosen_reward"] = sums["chosen_reward"] / sums["chosen"]
    if sums["rejected"]:
        means["rejected_reward"] = sums["rejected_reward"] / sums["rejected"]
    if sums["chosen"] and sums["rejected"]:
        means["margin"] = means["chosen_reward"] - means["rejected_reward"]
    return means | ({"kl": sums["kl"] / count} if kind == "kto" else {})


def _means(names: list[str], sums: torch.Tensor) -> dict[str, float]:
    """Return the loss per token of each column of [3, N] that has tokens."""
    losses, tokens, _ = sums.tolist()
    return {n: loss / count for n, loss, count in zip(names, losses, tokens, strict=True) if count}
