"""megatron-core's router with auxiliary losses that weigh the same in every layout."""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch.distributed import ProcessGroup


class Router(TopKRouter):
    """``TopKRouter`` whose auxiliary losses keep their coefficients under tensor and context ranks.

    With ``calculate_per_token_loss`` all gradients are divided by N, the tokens of the global
    batch, so that a loss of a micro-batch must be multiplied by the tokens T of that micro-batch.
    megatron-core 0.16.1 multiplies by the tokens of the rank (transformer/moe/router.py:446 and
    484), which share out T over tensor and context ranks: the balance and z losses act r = TP x CP
    times too weakly (global_aux_loss: r = TP x CP x DP). With the rank's part a_r of a balance loss
    (parts add up to the loss), and z_r the mean of its tokens' squared log-sum-exps, this router
    injects

    - T a_r on every rank, in total T times the loss;
    - coefficient x T / r x z_r on every rank, in total T times the mean over the micro-batch.
    """

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: ProcessGroup,
        reduce_group_has_dp: bool = False,
        valid_token_count: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As upstream; the token count is that of all ranks which hold parts of the loss.

        Args:
            activation: [tokens, ...] of this rank; the loss rides on its gradient.
            aux_loss_coeff: already inside ``aux_loss``; divided out for the log.
            aux_loss: this rank's part.
            aux_loss_name: in the tracker.
            reduce_group: ranks whose parts add up to the loss.
            reduce_group_has_dp: whether it spans data-parallel ranks.
            valid_token_count: this rank's tokens; None: rows of ``activation``.
        """
        tokens = activation.shape[0] if valid_token_count is None else valid_token_count
        attached: torch.Tensor = super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            reduce_group_has_dp,
            valid_token_count=tokens * reduce_group.size(),
        )
        return attached

    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Let coefficient x mean((log sum exp logits)^2) ride on ``logits`` [tokens, experts]."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        mean = z_loss_func(logits, 1.0, padding_mask=padding_mask)
        weight: Any = coefficient / self.tp_cp_group.size()
        if self.calculate_per_token_loss:
            tokens = logits.shape[0] if padding_mask is None else (~padding_mask).sum()
            weight = coefficient * tokens
        save_to_aux_losses_tracker("z_loss", mean, self.layer_number, self.config.num_layers)
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, mean * weight)
        return attached
