"""The routers of --moe-router-type beside `Router`.

Each class states its rule, source and trade-off. Shape suffixes: T tokens of this rank, E experts,
k = topk; S positions of B sequences in the micro-batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import router_gating_linear

from moetron.moe.config.bridge import ModelConfig
from moetron.moe.routing.assignment import linear_assignment, sinkhorn
from moetron.moe.routing.balance import BALANCE_LOSSES
from moetron.moe.routing.gradient_estimators import (
    annealed,
    relaxed_topk,
    straight_through,
    top_choices,
)
from moetron.moe.routing.hash import HashRouter
from moetron.moe.routing.noisy_load import cv_squared, win_probability
from moetron.moe.routing.reinforce import ReinforceRouter
from moetron.moe.routing.router import Router

Choice = tuple[torch.Tensor, torch.Tensor]
"""Weights and map (bool), both [T, E]."""


class ExpertChoiceRouter(Router):
    """Router whose experts each take the C tokens of a group with the highest scores.

    A token gets 0 to E experts. Scores are a softmax over experts (Zhou et al., arXiv 2202.09368,
    section 3.2). The group is --moe-capacity-scope, C follows --moe-expert-capacity-factor (1: k
    experts per token on average). Load is exactly even, without a balance loss. But a token's
    experts depend on later tokens of the group, which generation does not have: training and
    validation losses are too low. With --moe-expert-choice-eval topk tokens choose their k best in
    evaluation, which needs no later token.
    """

    def choose(self, logits_TE: torch.Tensor, batch: int) -> Choice:
        """Choose experts as the class describes."""
        scores_TE = _softmax(logits_TE)
        if self.training or self.config.moe_expert_choice_eval == "expert_choice":
            chosen_TE = self.within_capacity(scores_TE, batch)
        else:
            chosen_TE = top_choices(scores_TE, self.topk)
        return scores_TE * chosen_TE, chosen_TE

    def limit(self, probs_TE: torch.Tensor, chosen_TE: torch.Tensor, batch: int) -> Choice:
        """Return the arguments: `choose` has applied the capacity."""
        return probs_TE, chosen_TE


class SinkhornRouter(Router):
    """Router by the k best Sinkhorn-balanced scores in training, plain scores in evaluation.

    See assignment.py; over all tokens of the micro-batch, where megatron-core's sees the rank's
    (Clark et al., arXiv 2202.01169, section 3). Nearly even load without a balance loss; choices
    depend on later tokens.
    """

    def choose(self, logits_TE: torch.Tensor, batch: int) -> Choice:
        """Choose experts as the class describes."""
        scores_TE = logits_TE.sigmoid() if self.topk == 1 else _softmax(logits_TE)
        rank_TE = logits_TE.detach()
        if self.training:
            # All-gather over TP x CP: the iteration balances all tokens of the micro-batch.
            all_SBE = self.tokens.gather(rank_TE.float().unflatten(0, (-1, batch)))
            balanced = sinkhorn(all_SBE.flatten(0, 1)).view_as(all_SBE)
            rank_TE = self.tokens.own(balanced).flatten(0, 1)
        chosen_TE = top_choices(rank_TE, self.topk)
        return scores_TE * chosen_TE, chosen_TE


class BaseRouter(Router):
    """Router by balanced assignment: one expert per token, the highest total score.

    See assignment.py; the weight is sigmoid(score), evaluation takes the best expert. Exactly even
    load without a loss, at a cost that limits it to small micro-batches; choices depend on later
    tokens.
    """

    def choose(self, logits_TE: torch.Tensor, batch: int) -> Choice:
        """Choose experts as the class describes."""
        if self.training:
            # All-gather over TP x CP: every rank solves the assignment of the full micro-batch.
            all_SBE = self.tokens.gather(logits_TE.unflatten(0, (-1, batch)))
            chosen = linear_assignment(all_SBE.flatten(0, 1)).view_as(all_SBE)
            chosen_TE = self.tokens.own(chosen).flatten(0, 1)
        else:
            chosen_TE = top_choices(logits_TE, 1)
        return logits_TE.sigmoid() * chosen_TE, chosen_TE


class RandomSecondRouter(Router):
    """Router that uses the best expert always, others with probability min(1, g / threshold).

    g are the weights of the k best, renormalised to sum 1 (ST-MoE, arXiv 2202.08906, appendix G;
    mesh-tensorflow's second_policy "random", threshold 0.2). Skipping weak second choices saves
    capacity; their weight is not redistributed. Evaluation uses all k.
    """

    is_random = True

    def choose(self, logits_TE: torch.Tensor, batch: int) -> Choice:
        """Choose experts as the class describes."""
        gates_TE, chosen_TE = super().choose(logits_TE, batch)
        if not self.training:
            return gates_TE, chosen_TE
        assert self.draws is not None
        drawn_TE = self.draws.uniform(gates_TE.unflatten(0, (-1, batch))).flatten(0, 1)
        chosen_TE = chosen_TE & self._visited(gates_TE.detach(), drawn_TE)
        return gates_TE * chosen_TE, chosen_TE

    def _visited(self, gates_TE: torch.Tensor, drawn_TE: torch.Tensor) -> torch.Tensor:
        lucky_TE = drawn_TE * self.config.moe_second_expert_threshold < gates_TE
        return top_choices(gates_TE, 1) | lucky_TE


class NoisyTopKRouter(Router):
    """Router by the k best noisy logits with a learned noise scale; see noisy_load.py.

    --moe-router-load-balancing-type noisy_load adds coefficient x (CV^2 of the experts' total
    weights + CV^2 of their smooth loads), over the micro-batch. The noise explores; it costs a
    second matrix, and choices differ between two passes. Evaluation draws no noise.
    """

    is_random = True

    def __init__(self, config: ModelConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        zeros = torch.zeros_like(self.weight, device=torch.cuda.current_device())
        self.noise_weight = torch.nn.Parameter(zeros)
        setattr(self.noise_weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self._spread_TE = self._load_TE = zeros  # of the current pass

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits [s, b, E]; stores the spread of their noise."""
        logits: torch.Tensor = super().gating(input)
        spread = router_gating_linear(input, self.noise_weight, None, logits.dtype)
        self._spread_TE = F.softplus(spread).flatten(0, 1)
        return logits

    def choose(self, logits_TE: torch.Tensor, batch: int) -> Choice:
        """Choose experts as the class describes."""
        noisy_TE = logits_TE
        if self.training:
            assert self.draws is not None
            noise = self.draws.normal(logits_TE.unflatten(0, (-1, batch))).flatten(0, 1)
            noisy_TE = logits_TE + noise.to(logits_TE.dtype) * self._spread_TE
            self._load_TE = win_probability(logits_TE, noisy_TE, self._spread_TE, self.topk)
        return super().choose(noisy_TE, batch)

    def balance(
        self,
        probs_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        batch: int,
        padding_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attach the loss of the class, or the usual ones.

        Every rank computes the full loss from sums over the r ranks of the micro-batch; its
        gradient is that of the rank's own terms. So it is attached in full but logged as 1 / r.
        """
        if not self.config.moe_noisy_load_loss:
            return super().balance(probs_TE, logits_TE, batch, padding_T)
        valid_T1 = None if padding_T is None else ~padding_T[:, None]
        terms_TE = [
            x.float() if valid_T1 is None else x.float() * valid_T1
            for x in (probs_TE, self._load_TE)
        ]
        sums_2E = torch.stack([x.sum(0) for x in terms_TE])
        # All-reduce over TP x CP, which split the micro-batch's tokens. Backward is the identity.
        sums_2E = reduce_from_tensor_model_parallel_region(sums_2E, self.tp_cp_group)
        loss = cv_squared(sums_2E[0]) + cv_squared(sums_2E[1])
        part = loss.detach() / self.tp_cp_group.size() + (loss - loss.detach())
        tokens_G = self._tokens(len(probs_TE), 1, padding_T)
        tokens = tokens_G if isinstance(tokens_G, int) else tokens_G[0]
        name = BALANCE_LOSSES["noisy_load"]
        return self.attach(probs_TE, part, self.config.moe_aux_loss_coeff, tokens, name)


class StraightThroughRouter(Router):
    """Router by the k best, each weighted 1 / k, with the gradient of its softmax probability.

    See gradient_estimators.py. Outputs do not shrink when the router is uncertain; the gradient is
    biased. Weights are equal, so the priority at full experts is the probability.
    """

    _scores_TE: torch.Tensor
    """Probabilities of the current pass."""

    def choose(self, logits_TE: torch.Tensor, batch: int) -> Choice:
        """Choose experts as the class describes."""
        probs_TE = _softmax(logits_TE)
        self._scores_TE = probs_TE.detach()
        chosen_TE = top_choices(probs_TE, self.topk)
        return straight_through(probs_TE, self.topk) * chosen_TE, chosen_TE

    def priority(self, probs_TE: torch.Tensor) -> torch.Tensor:
        """Return the probabilities."""
        return self._scores_TE


class GumbelRouter(Router):
    """Router by the k best of (logits + Gumbel noise) / t, weighted by the softmax of all.

    Choices are samples without replacement from softmax(logits) (Jang et al., arXiv 1611.01144;
    Kool et al., arXiv 1903.06059). The temperature t falls from --moe-router-temperature to
    --moe-router-final-temperature over --moe-router-anneal-samples: high t explores with smooth
    gradients, low t approximates a hard choice. Evaluation draws no noise.
    """

    is_random = True

    def choose(self, logits_TE: torch.Tensor, batch: int) -> Choice:
        """Choose experts as the class describes."""
        assert self.draws is not None
        noisy_TE = logits_TE
        if self.training:
            noise = self.draws.gumbel(logits_TE.unflatten(0, (-1, batch))).flatten(0, 1)
            noisy_TE = logits_TE + noise.to(logits_TE.dtype)
        probs_TE = _softmax(noisy_TE / self._temperature(batch))
        chosen_TE = top_choices(probs_TE, self.topk)
        return probs_TE * chosen_TE, chosen_TE

    def _temperature(self, batch: int) -> float:
        config = self.config
        assert self.draws is not None
        start = config.moe_router_temperature
        if config.moe_router_anneal_samples is None:
            return start
        number = self.draws.number if self.training else self.draws.done
        done = number * batch / config.moe_router_anneal_samples
        return annealed(start, config.moe_router_final_temperature, done)


class RelaxedTopKRouter(Router):
    """Router by the k best, weighted by 1 / k times the relaxed top-k mask of `relaxed_topk`.

    Weights of chosen experts approach 1 / k and do not compete as in a softmax: one may rise
    without another falling, unless it is near the threshold. A low --moe-router-temperature makes
    the mask hard.
    """

    def choose(self, logits_TE: torch.Tensor, batch: int) -> Choice:
        """Choose experts as the class describes."""
        chosen_TE = top_choices(logits_TE, self.topk)
        weights_TE = relaxed_topk(logits_TE, self.topk, self.config.moe_router_temperature)
        return weights_TE * chosen_TE / self.topk, chosen_TE


KINDS: dict[str, type[Router]] = {
    "topk": Router,
    "expert_choice": ExpertChoiceRouter,
    "base": BaseRouter,
    "random_second": RandomSecondRouter,
    "noisy_topk": NoisyTopKRouter,
    "straight_through": StraightThroughRouter,
    "gumbel": GumbelRouter,
    "relaxed_topk": RelaxedTopKRouter,
    "reinforce": ReinforceRouter,
    "hash": HashRouter,
}


def router_class(config: Any) -> type[Router]:
    """Return the router class of a `ModelConfig`; load balancing "sinkhorn" also selects one."""
    if config.moe_router_load_balancing_type == "sinkhorn":
        return SinkhornRouter
    return KINDS[config.moe_router_type]


def _softmax(logits_TE: torch.Tensor) -> torch.Tensor:
    return logits_TE.softmax(dim=-1, dtype=torch.float32).to(logits_TE.dtype)
