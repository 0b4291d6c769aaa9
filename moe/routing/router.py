"""Token-choice top-k router: megatron-core's with our capacity, counts and auxiliary losses.

The other routers (router_types.py) build on it. Shape suffixes: S positions of B sequences in the
micro-batch; s positions of b sequences on this rank, T = s x b tokens; E experts of the layer on
all ranks; G groups of tokens. Every rank routes its own T tokens with a full copy of the router
matrix: tensor ranks (under sequence parallelism) and context ranks hold different positions of the
same sequences, data ranks different sequences.
"""

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.distributed import ProcessGroup

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.routing.balance import BALANCE_LOSSES, balance_part, choice_shares, z_part
from moetron.moe.routing.capacity import (
    NOT_CHOSEN,
    Capacity,
    fill_free_slots,
    from_groups,
    kept_choices,
    to_groups,
)
from moetron.moe.routing.losses import record_auxiliary_loss
from moetron.moe.routing.micro_batch_value import MicroBatchValue
from moetron.moe.routing.random_draws import Draws
from moetron.moe.routing.token_group import TokenGroup


class Router(TopKRouter):
    """``TopKRouter`` with corrections.

    **Capacity.** megatron-core 0.16.1 counts the tokens of a rank, so that tensor and context ranks
    change what is dropped, and drops by position with a top-k over ties (moe_utils.py:847), which
    keeps arbitrary tokens. Here experts have slots per micro-batch, or per sequence, over all ranks
    that hold it (or per rank, as upstream); tokens are kept sequence by sequence, each from left to
    right, or by probability; see capacity.py. The bias of --moe-router-enable-expert-bias and
    balance losses use choices before dropping.

    **Counts** of choices are int64: in megatron-core's, cast to bf16, 256 + 1 is 256.

    **Auxiliary losses** are computed, attached and logged here (`attach`), each as this rank's part
    of the loss of its micro-batch; parts add up over the TP x CP ranks that hold the micro-batch.
    With ``calculate_per_token_loss`` the loss of a micro-batch has the weight n / N, its fraction
    of the loss tokens of the global batch, otherwise 1 / number of micro-batches. megatron-core
    divides by N, so a part is multiplied by n (`loss_tokens`); its own: docs/numerics.md.
    """

    is_random = False
    """Whether the router draws random numbers in training."""
    draws: Draws | None
    chosen: torch.Tensor | None = None
    """Choices of the last forward pass before dropping, bool [tokens, experts]."""
    _choices_E: torch.Tensor | None = None
    padded_dispatcher: MoEAlltoAllTokenDispatcher | None = None
    """Dispatcher that needs the capacity of padded experts."""

    def __init__(
        self,
        config: ModelConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        assert pg_collection is not None
        if config.router_init_method is not None:
            config = copy.copy(config)
            config.init_method = config.router_init_method
        super().__init__(config, pg_collection)
        self.is_mtp_layer = is_mtp_layer
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
        self._count_in_whole_numbers()
        self.loss_tokens = MicroBatchValue()
        self.padding = MicroBatchValue()
        self._loss_tokens: torch.Tensor | None = None  # of the current pass

    def _count_in_whole_numbers(self) -> None:
        """Register int64 counters, replacing megatron-core's float ones."""
        counters = {"step_choices": False, "previous_choices": True} if self._by_step else {}
        if self.enable_expert_bias:
            counters["local_tokens_per_expert"] = False
        if self.global_tokens_per_expert is not None:
            counters["global_tokens_per_expert"] = False
        device = torch.cuda.current_device()
        for name, persistent in counters.items():
            zeros = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
            self.register_buffer(name, zeros, persistent)
        self.ga_steps = None  # fractions need no number of micro-batches

    @property
    def _by_step(self) -> bool:
        """Return whether the global balance loss counts the choices of the previous step."""
        return bool(self.config.moe_global_aux_loss_counts == "previous_step")

    def set_layer_number(self, layer_number: int) -> None:
        """Number all layers of the model from 1; multi-token prediction follows the decoder.

        megatron-core 0.19 numbers the layers of multi-token prediction from 1 and says so
        (``is_mtp_layer``), 0.16 as here.
        """
        before = self.config.num_layers if self.is_mtp_layer else 0
        super().set_layer_number(before + layer_number)

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts for the tokens ``input`` [s, b, H]; see `routing`.

        ``padding_mask``, bool [s, b], marks padding; unset: that of `padding`. Balance losses,
        z-loss, biases and counts leave it out, and it takes no slot of experts with a capacity.
        """
        if self.draws is not None and self.training:
            self.draws.start(self.layer_number)
        self._loss_tokens = self.loss_tokens.take(self.training)
        if padding_mask is None:
            padding_mask = self.padding.take(self.training)
        result: tuple[torch.Tensor, torch.Tensor] = super().forward(input, padding_mask)
        return result

    def apply_input_jitter(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply ``input`` [s, b, H] by U[1 - eps, 1 + eps] in training, equal in all layouts."""
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
            Weights and map (bool) of the kept choices, both [s x b, experts]; the map of padded
            experts also holds tokens that fill free slots, with weight 0.
        """
        batch = logits.shape[1]
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits.flatten(0, 1), padding_T)
        probs_TE, chosen_TE = self.choose(logits_TE, batch)
        counted_TE = chosen_TE if padding_T is None else chosen_TE & ~padding_T[:, None]
        self._remember(counted_TE)
        if self.training and torch.is_grad_enabled():
            probs_TE = self.balance(probs_TE, logits_TE, batch, padding_T)
        self._apply_expert_bias(chosen_TE, padding_T)
        # Without a capacity padding is dispatched too: megatron-core expects k choices of a token.
        return self.limit(probs_TE, chosen_TE if self.capacity is None else counted_TE, batch)

    def _remember(self, chosen_TE: torch.Tensor) -> None:
        """Set the choices of this pass, without padding's."""
        self.chosen, self._choices_E = chosen_TE, None

    def choices_of_experts(self) -> torch.Tensor:
        """Return how often each expert was chosen in the last pass: int64 [E], not to be changed.

        Losses, biases and the recorder share one pass over the choices.
        """
        if self._choices_E is None:
            assert self.chosen is not None
            self._choices_E = self.chosen.sum(0)
        return self._choices_E

    def choose(self, logits_TE: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and choices (bool), both [s x b, experts], before any drop."""
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
            fused=config.moe_router_fusion,
        )
        return choice

    def balance(
        self,
        probs_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        batch: int,
        padding_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attach the balance loss to ``probs_TE``; it counts the k best scores, or only the best.

        Scores are a softmax over all experts, or sigmoids divided by their sum, in fp32 or fp64.
        Collective over TP x CP (global_aux_loss: TP x CP x DP).
        """
        kind, coefficient = self.routing_type, self.config.moe_aux_loss_coeff
        if kind not in BALANCE_LOSSES or not coefficient:
            return probs_TE
        groups = batch if kind == "seq_aux_loss" else 1
        scores_TE, counts_GE = self._scores_and_counts(logits_TE, groups, padding_T)
        scores_sGE = scores_TE.view(-1, groups, self.num_experts)
        tokens_G = self._tokens(len(scores_sGE), groups, padding_T)
        part = balance_part(self._shares(kind, counts_GE), scores_sGE, tokens_G)
        total = tokens_G * groups if isinstance(tokens_G, int) else tokens_G.sum()
        return self.attach(probs_TE, part, coefficient, total, BALANCE_LOSSES[kind])

    def _scores_and_counts(
        self, logits_TE: torch.Tensor, groups: int, padding_T: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores [T, E] of the balance loss and its counts int64 [G, E], of this rank.

        The choices of this pass are counted where they are the best scores anyway.
        """
        wide_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
        counted = 1 if self.config.moe_aux_loss_first_choice_only else self.topk
        is_wide = logits_TE is wide_TE  # narrow logits are equal where wide scores are not
        if counted == self.topk and is_wide and self._chooses_best_scores and padding_T is None:
            scores_TE = self._scores(wide_TE)
            if groups == 1:
                return scores_TE, self.choices_of_experts()[None]
            assert self.chosen is not None
            map_TE = self.chosen
        else:
            map_TE, scores_TE = compute_routing_scores_for_aux_loss(
                wide_TE,
                counted,
                self.score_function,
                self.config.moe_router_fusion,
                padding_mask=padding_T,
            )
        return scores_TE, map_TE.view(-1, groups, self.num_experts).sum(0)

    @property
    def _chooses_best_scores(self) -> bool:
        """Return whether tokens choose the experts with the best scores."""
        return (
            type(self).choose is Router.choose
            and self.expert_bias is None
            and not self.config.moe_router_group_topk
            and not self.config.moe_router_fusion
        )

    def _scores(self, wide_TE: torch.Tensor) -> torch.Tensor:
        """Return what ``compute_routing_scores_for_aux_loss`` does, without its top-k."""
        if self.score_function == "softmax":
            return wide_TE.softmax(-1, dtype=torch.float32)
        scores_TE = wide_TE.sigmoid()
        return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)

    def _tokens(self, rows: int, groups: int, padding_T: torch.Tensor | None) -> torch.Tensor | int:
        """Count each group's tokens over all ranks of the micro-batch, no padding: int64 [G].

        A number, which costs no operation, if there is no padding.
        """
        if padding_T is None:
            return rows * self.tp_cp_group.size()
        # All-reduce over TP x CP, which hold different positions of the micro-batch.
        return self._all_reduced((~padding_T).view(-1, groups).sum(0), self.tp_cp_group)

    def _shares(self, kind: str, counts_GE: torch.Tensor) -> torch.Tensor:
        """Return the fractions f for the loss ``kind``, float64 [G, E], from this rank's counts.

        aux_loss and seq_aux_loss count the micro-batch. global_aux_loss counts all micro-batches of
        all data-parallel ranks so far in this step (Megatron's running mean, which depends on the
        number of ranks), or the previous global batch, which is the same in every layout (before
        the first step: 1 / E, which gives no gradient).
        """
        if kind != "global_aux_loss":
            # All-reduce over TP x CP: f is over the micro-batch, whose positions they split.
            return choice_shares(self._all_reduced(counts_GE, self.tp_cp_group))
        if not self._by_step:
            # All-reduce over TP x CP x DP: f is over the global batch so far.
            counts_E = self._all_reduced(counts_GE[0], self.tp_dp_cp_group)
            self.global_tokens_per_expert += counts_E
            return choice_shares(self.global_tokens_per_expert[None])
        self.step_choices += counts_GE[0]
        none = self.previous_choices.sum() == 0
        return choice_shares((self.previous_choices + none)[None])

    @staticmethod
    def _all_reduced(counts: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        """Sum int64 ``counts`` over ``group``, whose ranks count different tokens."""
        if group.size() > 1:
            counts = counts.clone()
            torch.distributed.all_reduce(counts, group=group)
        return counts

    def limit(
        self, probs_TE: torch.Tensor, chosen_TE: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and map of the choices that capacity keeps."""
        if self.capacity is None:
            return probs_TE, chosen_TE
        priority_TE = self.priority(probs_TE).masked_fill(~chosen_TE, NOT_CHOSEN)
        kept_TE = self.within_capacity(priority_TE, batch)
        return probs_TE * kept_TE, kept_TE

    def priority(self, probs_TE: torch.Tensor) -> torch.Tensor:
        """Return the priority of choices at full experts, [s x b, experts]: the weights."""
        return probs_TE.detach()

    def within_capacity(self, priority_TE: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the choices that get a slot, bool [s x b, experts]; see capacity.py.

        Collective over TP x CP, unless experts have slots per rank.
        """
        assert self.capacity is not None
        scope = self.config.moe_capacity_scope
        priority_sbE = priority_TE.detach().unflatten(0, (-1, batch))
        # All-gather over TP x CP: slots are per micro-batch or sequence, so every rank ranks the
        # choices of all positions and takes the rows of its own tokens from the result.
        priority_SBE = priority_sbE if scope == "rank" else self.tokens.gather(priority_sbE)
        priority_GTE = to_groups(priority_SBE, scope)
        groups, tokens, experts = priority_GTE.shape
        slots = self.capacity.slots(tokens, experts, self.topk, self.training)
        policy = self.config.moe_token_drop_policy
        kept_GTE = kept_choices(priority_GTE, slots, policy, self.topk)
        if self.config.moe_pad_expert_input_to_capacity:
            kept_GTE = fill_free_slots(kept_GTE, slots)
            self._set_dispatcher_capacity(groups * slots, groups * tokens)
        kept_SBE = from_groups(kept_GTE, batch)
        return (kept_SBE if scope == "rank" else self.tokens.own(kept_SBE)).flatten(0, 1)

    def _set_dispatcher_capacity(self, slots: int, tokens: int) -> None:
        """Set the factor with which the dispatcher's ceil(k T / E x factor) equals ``slots``.

        Half a slot below, so that rounding errors do not matter.
        """
        if self.padded_dispatcher is not None:
            mean_load = tokens * self.topk / self.config.num_moe_experts
            self.padded_dispatcher.moe_expert_capacity_factor = (slots - 0.5) / mean_load

    def reset_global_aux_loss_tracker(self) -> None:
        """Reset counts; megatron-core calls this when gradients are final (collective)."""
        if self.global_tokens_per_expert is not None:
            self.global_tokens_per_expert.zero_()
        if self._by_step:
            # All-reduce over TP x CP x DP: the next step's f is over this global batch.
            choices_E = self._all_reduced(self.step_choices, self.tp_dp_cp_group)
            self.previous_choices.copy_(choices_E)
            self.step_choices.zero_()

    def _apply_expert_bias(
        self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        """Count choices (bool [tokens, experts]) of training passes, without padding."""
        if self.enable_expert_bias and self.training and torch.is_grad_enabled():
            if padding_mask is None:
                self.local_tokens_per_expert += self.choices_of_experts()
            else:
                self.local_tokens_per_expert += (routing_map & ~padding_mask[:, None]).sum(0)

    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attach coefficient x mean((log sum exp logits)^2) to ``logits`` [tokens, experts]."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        tokens_G = self._tokens(len(logits), 1, padding_mask)
        tokens = tokens_G if isinstance(tokens_G, int) else tokens_G[0]
        part = z_part(logits, padding_mask, tokens)
        return self.attach(logits, part, coefficient, tokens, "z_loss")

    def attach(
        self,
        activation: torch.Tensor,
        part: torch.Tensor,
        coefficient: float,
        tokens: torch.Tensor | int,
        name: str,
    ) -> torch.Tensor:
        """Add coefficient x ``part`` to the backward pass of ``activation``, and log ``part``.

        Args:
            activation: any tensor of the pass; returned unchanged.
            part: this rank's part of the loss of the micro-batch; a scalar.
            coefficient: of the loss.
            tokens: of the micro-batch, over all its ranks; its weight unless `loss_tokens` is set.
            name: of its sums in losses.py.
        """
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        record_auxiliary_loss(name, part, self.layer_number, layers)
        loss_tokens = tokens if self._loss_tokens is None else self._loss_tokens
        weight = coefficient * (loss_tokens if self.calculate_per_token_loss else 1)
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(activation, part * weight)
        return attached
