"""megatron-core's router: capacity of our own, auxiliary losses that weigh the same everywhere.

Token choice; the other routers of kinds.py build on it.
"""

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    save_to_aux_losses_tracker,
    topk_routing_with_score_function,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.distributed import ProcessGroup

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.routing.capacity import (
    NOT_CHOSEN,
    Capacity,
    filled_up,
    from_groups,
    served,
    to_groups,
)
from moetron.moe.routing.random_draws import Draws
from moetron.moe.routing.token_group import TokenGroup


class Router(TopKRouter):
    """``TopKRouter`` with corrections.

    **Capacity.** megatron-core 0.16.1 counts the tokens of a rank, so that tensor and context ranks
    change what is dropped, and drops by position with a top-k over ties (moe_utils.py:847), which
    keeps arbitrary tokens. Here experts have slots for the micro-batch, or for each of its
    sequences, over all ranks that share it (or for a rank, as upstream); tokens are served sequence
    by sequence, each from left to right, or by probability; see capacity.py. The bias of
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

    **Counts of the global balance loss** are, on request, those of the whole previous step, see
    `_apply_global_aux_loss`.
    """

    is_random = False
    """Whether it draws random numbers in training."""
    draws: Draws | None
    chosen: torch.Tensor | None = None
    """Choices of the last forward pass before dropping, bool [tokens, experts]."""
    padded_dispatcher: MoEAlltoAllTokenDispatcher | None = None
    """The dispatcher that must know the capacity of padded experts."""

    def __init__(
        self, config: ModelConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        assert pg_collection is not None
        if config.router_init_method is not None:
            config = copy.copy(config)
            config.init_method = config.router_init_method
        super().__init__(config, pg_collection)
        self.capacity: Capacity | None = None
        if config.moe_expert_capacity_factor is not None:
            self.capacity = Capacity(
                config.moe_expert_capacity_factor,
                config.moe_eval_capacity_factor,
                config.moe_minimum_capacity,
                config.moe_capacity_includes_topk,
            )
        self.tokens = TokenGroup(pg_collection, config.sequence_parallel)
        draws = self.is_random or config.moe_input_jitter_eps
        self.draws = Draws(config.routing_seed, self.tokens, pg_collection.dp) if draws else None
        if self._counts_previous_step:
            device = torch.cuda.current_device()
            empty = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
            self.register_buffer("previous_choices", empty)
            self.register_buffer("step_choices", empty.clone(), persistent=False)

    @property
    def _counts_previous_step(self) -> bool:
        return bool(self.config.moe_global_aux_loss_counts == "previous_step")

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts for the tokens ``input`` [s, b, H]; see `routing`."""
        if self.draws is not None and self.training:
            self.draws.start(self.layer_number)
        result: tuple[torch.Tensor, torch.Tensor] = super().forward(input, padding_mask)
        return result

    def apply_input_jitter(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` [s, b, H] times U[1 - eps, 1 + eps] in training, the same in every layout."""
        eps = self.config.moe_input_jitter_eps
        if not eps or not self.training:
            return input
        assert self.draws is not None
        return input * (1 - eps + 2 * eps * self.draws.uniform(input)).to(input.dtype)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts for ``logits`` [s, b, experts].

        Returns:
            Weights and map (bool) of the choices that are served, both [s x b, experts]; the map
            of padded experts also holds tokens that fill them up, with weight 0.
        """
        batch = logits.shape[1]
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits.flatten(0, 1), padding_T)
        probs_TE, chosen_TE = self.choose(logits_TE, batch)
        if self.training and torch.is_grad_enabled():
            probs_TE = self.balance(probs_TE, logits_TE, batch, padding_T)
        self._apply_expert_bias(chosen_TE)
        self.chosen = chosen_TE
        return self.limit(probs_TE, chosen_TE, batch)

    def choose(self, logits_TE: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choices (bool), both [s x b, experts], before experts drop any."""
        config = self.config
        choice: tuple[torch.Tensor, torch.Tensor] = topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
        )
        return choice

    def balance(
        self,
        probs_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        batch: int,
        padding_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """Let the balance loss ride on ``probs_TE``; it counts the k best scores, or the best."""
        if not self.is_aux_loss_enabled():
            return probs_TE
        first = self.config.moe_aux_loss_first_choice_only
        map_TE, scores_TE = compute_routing_scores_for_aux_loss(
            logits_TE, 1 if first else self.topk, self.score_function, padding_mask=padding_T
        )
        if first:
            map_TE = map_TE * self.topk  # upstream divides counts by k
        masked = padding_T is not None
        probs_TE = self._apply_aux_loss(probs_TE, scores_TE, map_TE, masked)
        length = len(logits_TE) // batch
        probs_TE = self._apply_seq_aux_loss(probs_TE, scores_TE, map_TE, length, batch, masked)
        return self._apply_global_aux_loss(probs_TE, scores_TE, map_TE, masked)

    def limit(
        self, probs_TE: torch.Tensor, chosen_TE: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and map of the choices that experts with a capacity serve."""
        if self.capacity is None:
            return probs_TE, chosen_TE
        merit_TE = self.merit(probs_TE).masked_fill(~chosen_TE, NOT_CHOSEN)
        kept_TE = self.serve(merit_TE, batch)
        return probs_TE * kept_TE, kept_TE

    def merit(self, probs_TE: torch.Tensor) -> torch.Tensor:
        """By what full experts rank choices, [s x b, experts]: the weights."""
        return probs_TE.detach()

    def serve(self, merit_TE: torch.Tensor, batch: int) -> torch.Tensor:
        """The choices that find a slot, bool [s x b, experts]; ``merit_TE`` as in capacity.py.

        Collective, unless experts have slots for each rank.
        """
        assert self.capacity is not None
        scope = self.config.moe_capacity_scope
        merit_sbE = merit_TE.detach().unflatten(0, (-1, batch))
        merit_SBE = merit_sbE if scope == "rank" else self.tokens.gather(merit_sbE)
        merit_GTE = to_groups(merit_SBE, scope)
        groups, tokens, experts = merit_GTE.shape
        slots = self.capacity.slots(tokens, experts, self.topk, self.training)
        kept_GTE = served(merit_GTE, slots, self.config.moe_token_drop_policy)
        if self.config.moe_pad_expert_input_to_capacity:
            kept_GTE = filled_up(kept_GTE, slots)
            self._tell_capacity(groups * slots, groups * tokens)
        kept_SBE = from_groups(kept_GTE, batch)
        return (kept_SBE if scope == "rank" else self.tokens.own(kept_SBE)).flatten(0, 1)

    def _tell_capacity(self, slots: int, tokens: int) -> None:
        """Give the dispatcher a factor that its ceil(k T / E x factor) turns into ``slots``.

        Half a slot below, so that no rounding error matters.
        """
        if self.padded_dispatcher is not None:
            share = tokens * self.topk / self.config.num_moe_experts
            self.padded_dispatcher.moe_expert_capacity_factor = (slots - 0.5) / share

    def _apply_global_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """Let coefficient x E sum_i f_i P_i ride on ``probs`` [tokens, experts].

        P_i is the mean score of expert i over the micro-batch. Upstream's f_i is a running mean
        over the micro-batches that this rank and its data-parallel peers have seen in this step, so
        that it depends on how many ranks share out the global batch. With counts of the
        "previous_step", f_i is the share of all choices of the previous global batch, the same in
        every layout (before the first step: 1 / E, which gives no gradient).
        """
        if not self._counts_previous_step:
            upstream: torch.Tensor = super()._apply_global_aux_loss(
                probs, scores_for_aux_loss, routing_map, with_padding_mask
            )
            return upstream
        self.step_choices += routing_map.sum(0)
        total = self.previous_choices.sum()
        even = torch.full_like(scores_for_aux_loss[0], 1 / self.num_experts)
        share_E = torch.where(total > 0, self.previous_choices / total.clamp(min=1), even)
        tokens = len(probs) * self.tp_cp_group.size()
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        part = (share_E * scores_for_aux_loss.sum(0)).sum() * self.num_experts / tokens
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, coefficient * part, "global_load_balancing_loss", self.tp_cp_group
        )

    def reset_global_aux_loss_tracker(self) -> None:
        """End a step: megatron-core calls this when gradients are final (collective)."""
        super().reset_global_aux_loss_tracker()
        if self._counts_previous_step:
            torch.distributed.all_reduce(self.step_choices, group=self.tp_dp_cp_group)
            self.previous_choices.copy_(self.step_choices)
            self.step_choices.zero_()

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
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        save_to_aux_losses_tracker("z_loss", mean, self.layer_number, layers)
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, mean * weight)
        return attached
