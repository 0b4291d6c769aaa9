"""Direct preference optimisation (DPO, arXiv 2305.18290) on pairs of answers.

Shape suffixes: B samples of a micro-batch, S positions of a sample, s of them on this rank, P pairs
of a sample (S / 2 places, of which some are in use).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch.distributed import ProcessGroup

PreferenceLoss = Literal["dpo", "dpo_norm", "kto"]
SUMS = ("loss", "accuracy", "chosen_reward", "rejected_reward", "kl", "chosen", "rejected")
"""What the losses give for each pair or example; chosen and rejected are their numbers."""


@dataclass(frozen=True)
class Preference:
    """Settings of the loss."""

    kind: PreferenceLoss
    beta: float
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def sums_of_conversations(
    values_Bs: torch.Tensor, conversation_Bs: torch.Tensor, length: int, group: ProcessGroup
) -> torch.Tensor:
    """Return the sum of each conversation's values over all positions: [B, S], differentiable.

    Args:
        values_Bs: of this context rank's positions.
        conversation_Bs: number of each position's conversation in its sample.
        length: S, at least the number of conversations.
        group: the context-parallel ranks.
    """
    none_BS = values_Bs.new_zeros(len(values_Bs), length)
    sums_BS = none_BS.scatter_add(1, conversation_Bs, values_Bs)
    if group.size() == 1:
        return sums_BS
    # All-reduce over the context group, whose ranks hold other positions of the conversations. All
    # ranks then compute the same loss; the backward pass is the identity, to a rank's own tokens.
    total_BS: torch.Tensor = reduce_from_tensor_model_parallel_region(sums_BS, group)
    return total_BS


def conversation_log_probs(
    batch: Mapping[str, torch.Tensor], losses_Bs: torch.Tensor, group: ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability and trained tokens of each conversation: [B, S]."""
    mask_Bs, place_Bs = batch["loss_mask"], batch["conversation"]
    length = batch["reference"].shape[1]
    log_probs_BS = sums_of_conversations(-losses_Bs * mask_Bs, place_Bs, length, group)
    return log_probs_BS, sums_of_conversations(mask_Bs, place_Bs, length, group)


def pair_losses(
    log_probs_BS: torch.Tensor,
    reference_BS: torch.Tensor,
    tokens_BS: torch.Tensor,
    pairs_B: torch.Tensor,
    preference: Preference,
) -> torch.Tensor:
    r"""Return `SUMS` of each pair, 0 for places without one: [7, B, P].

    With the rewards :math:`r = \beta (\log \pi - \log \pi_{ref})` of both answers, their
    log-probabilities summed over trained tokens (dpo_norm: the mean),
    :math:`L = -\log \sigma(r_c - r_r)`; ``label_smoothing`` of the pairs count as swapped.

    Args:
        log_probs_BS: of conversations, the chosen one of each pair before the rejected one.
        reference_BS: the same under the reference model.
        tokens_BS: trained tokens of each conversation.
        pairs_B: pairs in each sample.
        preference: settings.
    """
    difference_BS = log_probs_BS - reference_BS
    if preference.kind == "dpo_norm":
        difference_BS = difference_BS / tokens_BS.clamp(min=1)
    places = difference_BS.shape[1] // 2
    rewards_BP2 = preference.beta * difference_BS[:, : 2 * places].unflatten(1, (places, 2))
    chosen_BP, rejected_BP = rewards_BP2.unbind(2)
    margin_BP = chosen_BP - rejected_BP
    loss_BP = -F.logsigmoid(margin_BP)
    if preference.label_smoothing:
        swapped_BP = -F.logsigmoid(-margin_BP)
        loss_BP = loss_BP.lerp(swapped_BP, preference.label_smoothing)
    accuracy_BP, one_BP = (margin_BP > 0).to(loss_BP.dtype), torch.ones_like(loss_BP)
    none_BP = torch.zeros_like(loss_BP)
    values_7BP = torch.stack(
        [loss_BP, accuracy_BP, chosen_BP, rejected_BP, none_BP, one_BP, one_BP]
    )
    is_used_BP = torch.arange(places, device=pairs_B.device) < pairs_B[:, None]
    return torch.where(is_used_BP, values_7BP, 0.0)
