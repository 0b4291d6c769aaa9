"""Grouped experts on FP8 tensor cores."""

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.kernels import scaled_activation
from moetron.moe.kernels.expert_rows import ExpertRows
from moetron.moe.kernels.fp8_rows import Fp8Rows, quantize_rows, scaled_grouped_mm
from moetron.moe.layers.experts import GroupedExperts, fc1_gradient
from moetron.moe.numerics.scaled_matmul import ScaledWeight, fit_tensor_cores


def scaled_experts_fit(config: TransformerConfig, expert_tensor_ranks: int) -> bool:
    """Return whether `ScaledGroupedExperts` supports the widths of this configuration."""
    assert config.moe_ffn_hidden_size is not None
    return fit_tensor_cores(config.hidden_size, config.moe_ffn_hidden_size // expert_tensor_ranks)


class ScaledGroupedExperts(GroupedExperts):
    """Grouped experts whose forward products and input gradients have FP8 operands.

    Tokens, output gradients, activations and their gradients have one current scale a row, weights
    one an output or input channel (`ScaledProduct` for why weight gradients are not in FP8).
    Tokens are quantised before their rows are copied. Parameters and checkpoints are those of
    `GroupedExperts`; the weights' FP8 copies are made once per optimizer step and take as much
    memory as bfloat16 parameters.

    Args:
        args: of `GroupedExperts`, as are ``kwargs``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.copies1, self.copies2 = ScaledWeight(), ScaledWeight()

    def run(self, x: torch.Tensor, probs: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """Return the output of ``forward``."""
        out: torch.Tensor = _Scaled.apply(x, probs, self.weight1, self.weight2, rows, self)
        return out


class _Scaled(torch.autograd.Function):
    """As the fused operation of `GroupedExperts`: the same is kept and made again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        probs: torch.Tensor,
        weight1: torch.Tensor,
        weight2: torch.Tensor,
        rows: ExpertRows,
        experts: ScaledGroupedExperts,
    ) -> torch.Tensor:
        weights, dtype = experts.copies1.rows(weight1), x.dtype
        hidden = scaled_grouped_mm(_quantized_rows(x, rows), weights, rows.ends_E, dtype)
        weight_R = rows.weights(probs)
        activated = scaled_activation.forward(experts.activation, hidden, weight_R)
        out = scaled_grouped_mm(activated, experts.copies2.rows(weight2), rows.ends_E, dtype)
        ctx.save_for_backward(x, hidden, weight_R, weight1, weight2)
        ctx.rows, ctx.experts = rows, experts
        return rows.combine(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, hidden, weight_R, weight1, weight2 = ctx.saved_tensors
        rows, experts, needed = ctx.rows, ctx.experts, ctx.needs_input_grad
        grad_x = grad_weight1 = grad_weight2 = None
        grad = grad.contiguous()
        weights, dtype = experts.copies2.columns(weight2), x.dtype
        grad_activated = scaled_grouped_mm(_quantized_rows(grad, rows), weights, rows.ends_E, dtype)
        grad_hidden, quantized, grad_weight_R, activated = scaled_activation.backward(
            experts.activation, grad_activated, hidden, weight_R
        )
        del grad_activated  # temporaries of [R, ...] are the peak of a step's memory
        if needed[3]:
            grad_weight2 = experts.gradient(
                weight2, partial(_fc2_gradient, experts, grad, activated, rows)
            )
        del activated
        if needed[0]:
            weights = experts.copies1.columns(weight1)
            grad_x = rows.combine(scaled_grouped_mm(quantized, weights, rows.ends_E, dtype))
        del quantized
        if needed[2]:
            grad_weight1 = experts.gradient(
                weight1, partial(fc1_gradient, experts, grad_hidden, x, rows)
            )
        grad_probs = rows.weight_gradient(grad_weight_R) if needed[1] else None
        return grad_x, grad_probs, grad_weight1, grad_weight2, None, None


def _fc2_gradient(
    experts: GroupedExperts, grad: torch.Tensor, activated: torch.Tensor, rows: ExpertRows
) -> torch.Tensor:
    """Return the second layer's weight gradient from the gradient of the tokens' outputs."""
    return experts.weight_gradient("fc2", rows.gather(grad), activated, rows)


def _quantized_rows(x: torch.Tensor, rows: ExpertRows) -> Fp8Rows:
    """Quantise tokens, then copy them to their rows: half the bytes of rows in bfloat16."""
    tokens = quantize_rows(x)
    # Bytes, since few operations copy FP8 numbers.
    values = rows.gather(tokens.values.view(torch.uint8)).view(tokens.values.dtype)
    return Fp8Rows(values, rows.gather(tokens.inverse.unsqueeze(1)).squeeze(1))
