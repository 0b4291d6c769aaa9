"""megatron-core's GPTModel, with what its routers cannot see and a z-loss on its output."""

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch.distributed import ProcessGroup

from moetron.moe.layers.attention import narrower
from moetron.moe.routing.hash import HashRouter
from moetron.moe.routing.reinforce import ReinforceRouter, advantages
from moetron.moe.routing.router import Router


def label_logits(
    logits_sbv: torch.Tensor, labels_bs: torch.Tensor, tp_group: ProcessGroup
) -> torch.Tensor:
    """The logit of each label, fp32 [b, s]; collective over ``tp_group``, differentiable.

    Args:
        logits_sbv: this tensor rank's rows of the vocabulary.
        labels_bs: token ids.
        tp_group: ranks that share out the vocabulary in their order.
    """
    rows = logits_sbv.shape[-1]
    place_T = labels_bs.transpose(0, 1).flatten() - tp_group.rank() * rows
    is_here_T = (place_T >= 0) & (place_T < rows)
    each_T = torch.arange(len(place_T), device=place_T.device)
    # An index keeps no logits for the backward pass, unlike gather: they will be overwritten.
    found_T = logits_sbv.flatten(0, 1)[each_T, place_T.clamp(0, rows - 1)].float() * is_here_T
    whole_T: torch.Tensor = reduce_from_tensor_model_parallel_region(found_T, tp_group)
    return whole_T.view(logits_sbv.shape[:2]).transpose(0, 1)


def _narrow_prefix(
    ahead: int, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give module number ``ahead`` of multi-token prediction the mask of a shorter prefix."""
    mask = kwargs.get("attention_mask")
    return args, {**kwargs, "attention_mask": None if mask is None else narrower(mask, ahead)}


class LanguageModel(GPTModel):
    """GPTModel that hands token ids and losses to routers, and keeps log Z of its output near 0.

    **Output z-loss** (PaLM, arXiv 2204.02311, section 5; T5X's ``z_loss``): token t adds
    coefficient x (log Z_t)^2, Z_t the sum of exp over its logits (rows that pad the vocabulary are
    among them, as in the cross-entropy). It weighs as the token's loss does, whatever that is
    averaged over, in modules of multi-token prediction too. The loss that is returned does not
    contain it; its gradient does. Since a loss is log Z minus the label's logit, log Z costs one
    number a token and no second pass over the vocabulary.
    """

    bidirectional_prefix = False
    """Whether samples had a part that sees all of itself: passes then need a mask."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.mtp_process:
            for layer in self.mtp.layers:
                hook = partial(_narrow_prefix, layer.layer_number)
                layer.register_forward_pre_hook(hook, with_kwargs=True)
        self._routers = [m for m in self.modules() if isinstance(m, Router)]
        self._hashed = [m for m in self.modules() if isinstance(m, HashRouter)]
        self._reinforced = [m for m in self.modules() if isinstance(m, ReinforceRouter)]
        self._squared_log_z_bs: torch.Tensor | None = None  # of the output computed last
        self._z_sums = torch.zeros(2, dtype=torch.float64, device="cpu")

    def forward(self, input_ids: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As GPTModel's."""
        for hashed in self._hashed:
            hashed.read(input_ids)
        output: torch.Tensor = super().forward(input_ids, *args, **kwargs)
        if self.training and self.post_process and kwargs.get("labels") is not None:
            mask_bs = kwargs.get("loss_mask")
            losses_bs = output.detach()
            self._learn(losses_bs, torch.ones_like(losses_bs) if mask_bs is None else mask_bs)
        return output

    def bring_loss_tokens(self, count: torch.Tensor) -> None:
        """Tell routers how many tokens of the next micro-batch (all its ranks) bear a loss."""
        for router in self._routers:
            router.loss_tokens.bring(count)

    def _learn(self, losses_bs: torch.Tensor, mask_bs: torch.Tensor) -> None:
        """Hand out what the losses of a micro-batch say."""
        if self._reinforced:
            per_token = self.config.calculate_per_token_loss
            apart_bs = advantages(losses_bs, mask_bs, self.pg_collection.cp, per_token)
            for reinforced in self._reinforced:
                reinforced.reward(apart_bs)
        if self._squared_log_z_bs is not None:  # the main output comes after those further ahead
            sums = torch.stack([(self._squared_log_z_bs * mask_bs).sum(), mask_bs.sum()])
            self._z_sums = self._z_sums.to(sums.device) + sums.double()

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Losses [b, s] of ``labels`` [b, s] under ``logits`` [s, b, rows of the vocabulary]."""
        coefficient = self.config.output_z_loss_coeff
        if coefficient is None or not self.training:
            plain: torch.Tensor = super().compute_language_model_loss(labels, logits)
            return plain
        # Before the cross-entropy, which overwrites fp32 logits.
        label_logits_bs = label_logits(logits, labels, self.pg_collection.tp)
        losses_bs: torch.Tensor = super().compute_language_model_loss(labels, logits)
        squared_bs = (losses_bs + label_logits_bs).square()
        self._squared_log_z_bs = squared_bs.detach()
        return losses_bs + coefficient * (squared_bs - squared_bs.detach())

    def take_squared_log_z(self) -> torch.Tensor:
        """Sum of (log Z)^2 over tokens that count, and their number, since the last call: [2]."""
        sums, self._z_sums = self._z_sums, torch.zeros_like(self._z_sums)
        return sums
