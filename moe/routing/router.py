"""megatron-core's router: capacity of our own, auxiliary losses that weigh the same everywhere."""

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    save_to_aux_losses_tracker,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.distributed import ProcessGroup

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.routing.capacity import Capacity, batch_major, filled_up, sequence_major, served


class Router(TopKRouter):
    """``TopKRouter`` with two corrections.

    **Capacity.** megatron-core 0.16.1 drops by position with a top-k over ties (moe_utils.py:847),
    which keeps arbitrary tokens. Here tokens of the rank are served sequence by sequence, each from
    left to right (its [s, b] rows read as [b, s]), or by probability; see capacity.py. The bias of
    --moe-router-enable-expert-bias learns from choices before dropping, as balance losses do.

    **Auxiliary losses** keep their coefficients under tensor and context ranks. With
    ``calculate_per_token_loss`` all gradients are divided by N, the tokens of the global batch, so
    that a loss of a micro-batch must be multiplied by the tokens T of that micro-batch.
    megatron-core 0.16.1 multiplies by the tokens of the rank (transformer/moe/router.py:446 and
    484), which share out T over tensor and context ranks: the balance and z losses act r = TP x CP
    times too weakly (global_aux_loss: r = TP x CP x DP). With the rank's part a_r of a balance loss
    (parts add up to the loss), and z_r the mean of its tokens' squared log-sum-exps, this router
    injects

    - T a_r on every rank, in total T times the loss;
    - coefficient x T / r x z_r on every rank, in total T times the mean over the micro-batch.
    """

    chosen: torch.Tensor | None = None
    """Choices of the last forward pass before dropping, bool [tokens, experts]."""
    padded_dispatcher: MoEAlltoAllTokenDispatcher | None = None
    """The dispatcher that must know the capacity of padded experts."""

    def __init__(
        self, config: ModelConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        self.capacity: Capacity | None = None
        if config.moe_expert_capacity_factor is not None:
            self.capacity = Capacity(
                config.moe_expert_capacity_factor,
                config.moe_eval_capacity_factor,
                config.moe_minimum_capacity,
                config.moe_capacity_includes_topk,
            )
            config = copy.copy(config)
            config.moe_expert_capacity_factor = None  # so that upstream's routing drops nothing
        super().__init__(config, pg_collection)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts for ``logits`` [s, b, experts].

        Returns:
            Weights and map (bool) of the choices that are served, both [s x b, experts]; the map
            of padded experts also holds tokens that fill them up, with weight 0.
        """
        batch = logits.shape[1]
        probs_TE, chosen_TE = super().routing(logits, padding_mask)
        self.chosen = chosen_TE
        if self.capacity is None:
            return probs_TE, chosen_TE
        tokens, experts = chosen_TE.shape
        slots = self.capacity.slots(tokens, experts, self.topk, self.training)
        kept_TE = served(
            batch_major(probs_TE.detach(), batch),
            batch_major(chosen_TE, batch),
            slots,
            self.config.moe_token_drop_policy,
        )
        if self.config.moe_pad_expert_input_to_capacity:
            kept_TE = filled_up(kept_TE, slots)
            self._tell_capacity(slots, tokens)
        kept_TE = sequence_major(kept_TE, batch)
        return probs_TE * kept_TE, kept_TE

    def _tell_capacity(self, slots: int, tokens: int) -> None:
        """Give the dispatcher a factor that its ceil(k T / E x factor) turns into ``slots``.

        Half a slot below, so that no rounding error matters.
        """
        if self.padded_dispatcher is not None:
            share = tokens * self.topk / self.config.num_moe_experts
            self.padded_dispatcher.moe_expert_capacity_factor = (slots - 0.5) / share

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
