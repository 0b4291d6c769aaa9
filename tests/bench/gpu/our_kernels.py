"""Our memory-bound operations against torch's, megatron-core's and Transformer Engine's.

Rates count the least that an operation reads and writes.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from moetron.moe.layers.norm import rms_norm
from tests.bench.gpu.kernel_case import Case, Group, Shape, forward_and_backward

_BF16 = 2
"""Bytes."""


def norm(shape: Shape) -> Iterator[Case]:
    """Yield RMSNorm over the width."""
    x, weight = shape.random(shape.tokens, shape.H, grad=True), shape.random(shape.H, grad=True)
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "F.rms_norm": lambda: F.rms_norm(x, (shape.H,), weight, 1e-5),
        "ours": lambda: rms_norm(x, weight, 1e-5),
    }
    for name, function in functions.items():
        moved = 2 * _BF16 * x.numel()
        yield from forward_and_backward(name, function, [x, weight], moved_bytes=moved)


def norm_of_transformer_engine(shape: Shape) -> Iterator[Case]:
    """Yield Transformer Engine's RMSNorm."""
    from transformer_engine.pytorch import RMSNorm

    layer = RMSNorm(shape.H, eps=1e-5, params_dtype=torch.bfloat16, device=shape.device)
    x = shape.random(shape.tokens, shape.H, grad=True)
    moved = 2 * _BF16 * x.numel()
    yield from forward_and_backward("te", lambda: layer(x), [x, layer.weight], moved_bytes=moved)


def _map(shape: Shape) -> torch.Tensor:
    """Return a routing map, bool [tokens, E], of random scores."""
    scores = torch.rand(shape.tokens, shape.E, device=shape.device)
    chosen = scores.topk(shape.k, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def _rows_bytes(shape: Shape) -> int:
    """Return the bytes of a gather: tokens read once, rows written; of a combine as well."""
    return _BF16 * shape.H * (shape.tokens + shape.rows)


def rows(shape: Shape) -> Iterator[Case]:
    """Yield our plan, gather and combine of the experts' rows."""
    from moetron.moe.kernels.expert_rows import plan_rows

    chosen_TE = _map(shape)
    plan = plan_rows(chosen_TE, shape.k)
    x, y = shape.random(shape.tokens, shape.H), shape.random(shape.rows, shape.H)
    probs_TE = torch.rand(chosen_TE.shape, device=shape.device)
    grad_R = torch.rand(shape.rows, device=shape.device)
    moved = _rows_bytes(shape)
    yield Case("plan", lambda: plan_rows(chosen_TE, shape.k), moved_bytes=chosen_TE.numel())
    yield Case("gather", lambda: plan.gather(x), moved_bytes=moved)
    yield Case("combine", lambda: plan.combine(y), moved_bytes=moved)
    yield Case("weights", lambda: plan.weights(probs_TE), moved_bytes=8 * shape.rows)
    yield Case("weight gradient", lambda: plan.weight_gradient(grad_R))


def permute_of_megatron(shape: Shape) -> Iterator[Case]:
    """Yield megatron-core's permute and unpermute, eager and Transformer Engine's fused ones."""
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    chosen_TE, moved = _map(shape), _rows_bytes(shape)
    x, y = shape.random(shape.tokens, shape.H), shape.random(shape.rows, shape.H)
    for fused in (False, True):
        name = "fused" if fused else "eager"

        def forth(fused: bool = fused) -> tuple[torch.Tensor, ...]:
            found: tuple[torch.Tensor, ...] = permute(
                x, chosen_TE, num_out_tokens=shape.rows, fused=fused
            )
            return found

        yield Case(f"permute, {name}", forth, moved_bytes=moved)
        if fused and not x.is_cuda:
            return
        index = forth()[2]

        def back(fused: bool = fused, index: torch.Tensor = index) -> torch.Tensor:
            found: torch.Tensor = unpermute(y, index, x.shape, routing_map=chosen_TE, fused=fused)
            return found

        yield Case(f"unpermute, {name}", back, moved_bytes=moved)


def activation(shape: Shape) -> Iterator[Case]:
    """Yield our SwiGLU with the token's weight, each pass."""
    from moetron.moe.kernels.activation import Activation

    swiglu = Activation(F.silu, True)
    hidden, grad = shape.random(shape.rows, 2 * shape.F), shape.random(shape.rows, shape.F)
    weight = torch.rand(shape.rows, device=shape.device)
    moved = _BF16 * (hidden.numel() + grad.numel())
    yield Case("forward", lambda: swiglu.forward(hidden, weight), moved_bytes=moved)
    yield Case("backward", lambda: swiglu.backward(grad, hidden, weight), moved_bytes=2 * moved)


def activation_of_megatron(shape: Shape) -> Iterator[Case]:
    """Yield megatron-core's fused one and eager operations."""
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl

    hidden = shape.random(shape.rows, 2 * shape.F, grad=True)
    weight = torch.rand(shape.rows, 1, device=shape.device, requires_grad=True)

    def eager() -> torch.Tensor:
        gate, up = hidden.chunk(2, -1)
        return (F.silu(gate) * up * weight).to(hidden.dtype)

    functions: dict[str, Callable[[], torch.Tensor]] = {
        "megatron-core, fused": lambda: weighted_bias_swiglu_impl(hidden, None, weight),
        "eager": eager,
    }
    for name, function in functions.items():
        yield from forward_and_backward(
            name,
            function,
            [hidden, weight],
            moved_bytes=_BF16 * 3 * shape.rows * shape.F,
            backward_bytes=5 / 3,
        )


def _logits(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    logits = shape.random(shape.tokens, shape.V, grad=True)
    return logits, torch.randint(shape.V, (shape.tokens,), device=shape.device)


def cross_entropy(shape: Shape) -> Iterator[Case]:
    """Yield our cross-entropy, whose backward pass overwrites the logits, and torch's in fp32."""
    from moetron.moe.kernels import cross_entropy as ours

    logits, labels = _logits(shape)
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: ours.cross_entropy(logits.view_as(logits), labels)[0],
        "F.cross_entropy of fp32": lambda: F.cross_entropy(
            logits.float(), labels, reduction="none"
        ),
    }
    for name, function in functions.items():
        yield from forward_and_backward(
            name, function, [logits], moved_bytes=_BF16 * logits.numel(), backward_bytes=2.0
        )


def cross_entropy_of_transformer_engine(shape: Shape) -> Iterator[Case]:
    """Yield Transformer Engine's, which megatron-core's fusion ``te`` calls."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    logits, labels = _logits(shape)
    yield from forward_and_backward(
        "te",
        lambda: parallel_cross_entropy(logits.view(shape.B, shape.S, -1), labels.view(shape.B, -1)),
        [logits],
        moved_bytes=_BF16 * logits.numel(),
        backward_bytes=2.0,
    )


def rotary(shape: Shape) -> Iterator[Case]:
    """Yield our rotary embedding of the queries."""
    from moetron.moe.kernels import rotary as ours

    x = shape.random(shape.S, shape.B, shape.A, shape.head, grad=True)
    angles = torch.rand(shape.S, 1, 1, shape.head, device=shape.device)
    layout = ours.PairLayout(False, False)
    moved = 2 * _BF16 * x.numel()
    yield from forward_and_backward(
        "ours", lambda: ours.rotary(x, angles, layout), [x], moved_bytes=moved, backward_bytes=1.0
    )


def rotary_of_megatron(shape: Shape) -> Iterator[Case]:
    """Yield megatron-core's eager operations and Transformer Engine's kernel."""
    from megatron.core.models.common.embeddings import rope_utils

    x = shape.random(shape.S, shape.B, shape.A, shape.head, grad=True)
    angles = torch.rand(shape.S, 1, 1, shape.head, device=shape.device)
    moved = 2 * _BF16 * x.numel()
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "eager": lambda: rope_utils._apply_rotary_pos_emb_bshd(x, angles),
        "te": lambda: rope_utils.fused_apply_rotary_pos_emb(x, angles),
    }
    for name, function in functions.items():
        yield from forward_and_backward(name, function, [x], moved_bytes=moved, backward_bytes=1.0)


def fp8_rows(shape: Shape) -> Iterator[Case]:
    """Yield our quantisers, alone and with the activation."""
    from moetron.moe.kernels import fp8_rows as ours
    from moetron.moe.kernels import scaled_activation
    from moetron.moe.kernels.activation import Activation

    swiglu = Activation(F.silu, True)
    x, grad = shape.random(shape.rows, shape.H), shape.random(shape.rows, shape.F)
    hidden = shape.random(shape.rows, 2 * shape.F)
    weights = shape.random(shape.E, 2 * shape.F, shape.H)
    probs = torch.rand(shape.rows, device=shape.device)
    yield Case("quantize_rows", lambda: ours.quantize_rows(x), moved_bytes=3 * x.numel())
    yield Case(
        "weights' rows", lambda: ours.quantize_rows(weights), moved_bytes=3 * weights.numel()
    )
    yield Case(
        "weights' columns", lambda: ours.quantize_columns(weights), moved_bytes=3 * weights.numel()
    )
    yield Case(
        "activation forward",
        lambda: scaled_activation.forward(swiglu, hidden, probs),
        moved_bytes=2 * hidden.numel() + grad.numel(),
    )
    yield Case(
        "activation backward",
        lambda: scaled_activation.backward(swiglu, grad, hidden, probs),
        moved_bytes=5 * hidden.numel() + 4 * grad.numel(),
    )


GROUPS: list[Group] = [
    norm,
    norm_of_transformer_engine,
    rows,
    permute_of_megatron,
    activation,
    cross_entropy,
    cross_entropy_of_transformer_engine,
    rotary,
    rotary_of_megatron,
    fp8_rows,
]
SLOW_GROUPS: list[Group] = [activation_of_megatron]
"""Of code that torch compiles first: seconds."""
