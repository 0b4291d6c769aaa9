"""Kahneman-Tversky optimisation (KTO, arXiv 2402.01306) on single answers, wanted or not.

Shape suffixes: B samples of a micro-batch, D conversations of a sample (places, of which some are
in use).
"""

import torch

from moetron.moe.preference.pair_losses import Preference


def baseline_of(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    r"""Return :math:`z_0`, a scalar float32 without gradient.

    :math:`z_0 = \max(0, \frac{1}{n} \sum_i \log \pi(y_j | x_i) - \log \pi_{ref}(y_j | x_i))`, an
    estimate of the divergence of the model from the reference, from prompts with the answers to
    other prompts.

    Args:
        total: the sum, over the global batch.
        count: n.
    """
    return (total / count.clamp(min=1)).clamp(min=0).float().detach()


def kto_losses(
    log_probs_BD: torch.Tensor,
    reference_BD: torch.Tensor,
    wanted_BD: torch.Tensor,
    examples_B: torch.Tensor,
    baseline: torch.Tensor,
    preference: Preference,
) -> torch.Tensor:
    r"""Return `SUMS` of each example, 0 for places without one: [7, B, D].

    With :math:`r = \log \pi(y|x) - \log \pi_{ref}(y|x)`, summed over trained tokens,
    :math:`L = \lambda_D (1 - \sigma(\beta (r - z_0)))` for a wanted answer and
    :math:`\lambda_U (1 - \sigma(\beta (z_0 - r)))` for one that is not. The reward is
    :math:`\beta r`; it is accurate if it is on the right side of :math:`\beta z_0`.

    Args:
        log_probs_BD: of conversations.
        reference_BD: the same under the reference model.
        wanted_BD: 1 for a wanted answer, else 0.
        examples_B: conversations in each sample.
        baseline: :math:`z_0`.
        preference: settings.
    """
    ratio_BD, is_wanted_BD = log_probs_BD - reference_BD, wanted_BD > 0
    gain_BD = preference.beta * (ratio_BD - baseline)
    gain_BD = torch.where(is_wanted_BD, gain_BD, -gain_BD)
    loss_BD = torch.where(is_wanted_BD, preference.desirable_weight, preference.undesirable_weight)
    loss_BD = loss_BD * torch.sigmoid(-gain_BD)
    reward_BD, wanted_BD = preference.beta * ratio_BD, is_wanted_BD.to(loss_BD.dtype)
    values_7BD = torch.stack(
        [
            loss_BD,
            (gain_BD > 0).to(loss_BD.dtype),
            reward_BD * wanted_BD,
            reward_BD * (1 - wanted_BD),
            baseline.expand_as(loss_BD),
            wanted_BD,
            1 - wanted_BD,
        ]
    )
    is_used_BD = torch.arange(ratio_BD.shape[1], device=examples_B.device) < examples_B[:, None]
    return torch.where(is_used_BD, values_7BD, 0.0)
