"""megatron-core's GPTModel with inputs for its routers and a z-loss on its output.

Shape suffixes: s positions and b samples on this rank, v rows of the vocabulary on this tensor
rank, T = s x b tokens.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch.distributed import ProcessGroup

from moetron.moe.kernels.availability import uses_triton
from moetron.moe.kernels.cross_entropy import cross_entropy
from moetron.moe.layers.attention import shorten_prefix
from moetron.moe.routing.hash import HashRouter
from moetron.moe.routing.reinforce import ReinforceRouter, advantages
from moetron.moe.routing.router import Router


def label_logits(
    logits_sbv: torch.Tensor, labels_bs: torch.Tensor, tp_group: ProcessGroup
) -> torch.Tensor:
    """Return the logit of each label, fp32 [b, s]; collective over ``tp_group``, differentiable.

    Args:
        logits_sbv: this tensor rank's rows of the vocabulary.
        labels_bs: token ids.
        tp_group: ranks that hold the rows of the vocabulary in order.
    """
    rows = logits_sbv.shape[-1]
    place_T = labels_bs.transpose(0, 1).flatten() - tp_group.rank() * rows
    is_here_T = (place_T >= 0) & (place_T < rows)
    each_T = torch.arange(len(place_T), device=place_T.device)
    # Unlike gather, indexing saves no logits for the backward pass: they will be overwritten.
    found_T = logits_sbv.flatten(0, 1)[each_T, place_T.clamp(0, rows - 1)].float() * is_here_T
    # All-reduce over the tensor group: one rank holds the label's row, the others add 0. Backward
    # is the identity.
    label_T: torch.Tensor = reduce_from_tensor_model_parallel_region(found_T, tp_group)
    return label_T.view(logits_sbv.shape[:2]).transpose(0, 1)


def mean_logits(logits_sbv: torch.Tensor, tp_group: ProcessGroup) -> torch.Tensor:
    """Return the mean logit of each token over the vocabulary, fp32 [b, s]; differentiable."""
    rows = logits_sbv.shape[-1] * tp_group.size()
    # All-reduce over the tensor group: each rank holds some rows. Backward is the identity.
    sums_sb = logits_sbv.sum(-1, dtype=torch.float32)  # without an fp32 copy of the logits
    total_sb = reduce_from_tensor_model_parallel_region(sums_sb, tp_group)
    mean_bs: torch.Tensor = total_sb.transpose(0, 1) / rows
    return mean_bs


def _narrow_prefix(
    ahead: int, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Shorten the prefix in the mask of module number ``ahead`` of multi-token prediction."""
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dtype != torch.bool:  # of documents: `LanguageModel.forward`
        return args, kwargs
    return args, {**kwargs, "attention_mask": shorten_prefix(mask, ahead)}


class LanguageModel(GPTModel):
    """GPTModel that passes token ids and losses to routers, with an optional output z-loss.

    **Output z-loss** (PaLM, arXiv 2204.02311, section 5; T5X's ``z_loss``): token t adds
    coefficient x (log Z_t)^2, Z_t the sum of exp over its logits (including padding rows of the
    vocabulary, as in the cross-entropy). It has the same weight as the token's loss, also in
    modules of multi-token prediction. The returned loss does not contain it; its gradient does.
    Since a loss is log Z minus the label's logit, log Z costs one number per token and no second
    pass over the vocabulary.
    """

    bidirectional_prefix = False
    """Whether samples have a bidirectional prefix: forward passes then need a mask."""
    takes_packed_sequences = False
    """Whether attention reads documents from ``packed_seq_params``, not from the mask."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.mtp_process:
            for layer in self.mtp.layers:
                hook = partial(_narrow_prefix, layer.layer_number)
                layer.register_forward_pre_hook(hook, with_kwargs=True)
        self._routers = [m for m in self.modules() if isinstance(m, Router)]
        self._hashed = [m for m in self.modules() if isinstance(m, HashRouter)]
        self._reinforced = [m for m in self.modules() if isinstance(m, ReinforceRouter)]
        self._loss_mask_bs: torch.Tensor | None = None  # of the present forward pass
        self._squared_log_z_bs: torch.Tensor | None = None  # of the most recent output
        self._z_sums = torch.zeros(2, dtype=torch.float64, device="cpu")

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run GPTModel's ``forward``.

        ``prediction_mask`` float [b, s], unset: ``loss_mask``, is the mask of multi-token
        prediction: 0 on the first token of each document, which no module predicts from the
        document before it.
        """
        mask_bs, prediction_mask_bs = kwargs.get("loss_mask"), kwargs.pop("prediction_mask", None)
        if prediction_mask_bs is not None:
            kwargs["loss_mask"] = prediction_mask_bs
        self._loss_mask_bs = mask_bs
        output: torch.Tensor = super().forward(*args, **kwargs)
        self._loss_mask_bs = None
        return output

    # Both hooks are also parts of the combined schedule (--overlap-moe-expert-parallel-comm), which
    # never calls ``forward``.
    def _preprocess(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Pass token ids to routers before the first layer."""
        for hashed in self._hashed:
            hashed.read(input_ids)
        return super()._preprocess(input_ids, *args, **kwargs)

    def _postprocess(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Pass losses to routers after the last layer."""
        output: torch.Tensor = super()._postprocess(*args, **kwargs)
        mask_bs = kwargs.get("loss_mask") if self._loss_mask_bs is None else self._loss_mask_bs
        if self.training and self.post_process and kwargs.get("labels") is not None:
            losses_bs = output.detach()
            mask_bs = torch.ones_like(losses_bs) if mask_bs is None else mask_bs
            self._record_losses(losses_bs, mask_bs)
        return output

    def set_loss_tokens(self, count: torch.Tensor) -> None:
        """Pass routers the number of loss tokens in the next micro-batch, over all its ranks."""
        for router in self._routers:
            router.loss_tokens.set_next(count)

    def set_padding(self, padding_bs: torch.Tensor | None) -> None:
        """Pass routers the padding, bool [b, s], of this context rank's next micro-batch.

        megatron-core's ``padding_mask`` does not reach multi-token prediction.
        """
        for router in self._routers:
            padding_sb = None if padding_bs is None else padding_bs.transpose(0, 1)
            own_sb = None if padding_sb is None else router.tokens.of_context_rank(padding_sb)
            router.padding.set_next(own_sb)

    def _record_losses(self, losses_bs: torch.Tensor, mask_bs: torch.Tensor) -> None:
        """Pass rewards to REINFORCE routers and sum (log Z)^2 for the metrics."""
        if self._reinforced:
            per_token = self.config.calculate_per_token_loss
            advantage_bs = advantages(losses_bs, mask_bs, self.pg_collection.cp, per_token)
            for reinforced in self._reinforced:
                reinforced.reward(advantage_bs)
        if self._squared_log_z_bs is not None:  # the main output's: it is computed last
            sums = torch.stack([(self._squared_log_z_bs * mask_bs).sum(), mask_bs.sum()])
            self._z_sums = self._z_sums.to(sums.device) + sums.double()

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Return the losses [b, s] of ``labels`` [b, s]; ``logits`` are [s, b, v]."""
        coefficient = self.config.output_z_loss_coeff if self.training else None
        smoothing = self.config.label_smoothing if self.training else 0.0
        # Before the cross-entropy, which overwrites fp32 logits.
        mean_logit_bs = mean_logits(logits, self.pg_collection.tp) if smoothing else None
        if uses_triton(logits) and not self.config.cross_entropy_loss_fusion:
            both = cross_entropy(logits, labels.transpose(0, 1), self.pg_collection.tp)
            losses_bs, log_z_bs = (each.transpose(0, 1).contiguous() for each in both)
        elif coefficient is None and not smoothing:
            losses_bs = super().compute_language_model_loss(labels, logits)
        else:
            label_logits_bs = label_logits(logits, labels, self.pg_collection.tp)
            losses_bs = super().compute_language_model_loss(labels, logits)
            log_z_bs = losses_bs + label_logits_bs
        if mean_logit_bs is not None:
            # Labels of 1 - a and others of a / (V - 1): a x V / (V - 1) of the mean over all rows.
            rows = logits.shape[-1] * self.pg_collection.tp.size()
            share = smoothing * rows / (rows - 1)
            losses_bs = losses_bs.lerp(log_z_bs - mean_logit_bs, share)
        if coefficient is None:
            return losses_bs
        squared_bs = log_z_bs.square()
        self._squared_log_z_bs = squared_bs.detach()
        return losses_bs + coefficient * (squared_bs - squared_bs.detach())

    def take_squared_log_z(self) -> torch.Tensor:
        """Return [sum of (log Z)^2 over loss tokens, their number] since the last call."""
        sums, self._z_sums = self._z_sums, torch.zeros_like(self._z_sums)
        return sums
