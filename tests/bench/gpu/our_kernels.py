"""Our memory-bound operations against torch's and Transformer Engine's."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from moetron.moe.layers.norm import rms_norm
from tests.bench.gpu.kernel_case import Case, Group, Shape, forward_and_backward


def norm(shape: Shape) -> Iterator[Case]:
    """Yield RMSNorm over the width."""
    x, weight = shape.random(shape.tokens, shape.H, grad=True), shape.random(shape.H, grad=True)
    moved = 4 * x.numel()
    for name, function in {
        "F.rms_norm": lambda: F.rms_norm(x, (shape.H,), weight, 1e-5),
        "ours": lambda: rms_norm(x, weight, 1e-5),
    }.items():
        yield from forward_and_backward(name, function, [x, weight], moved_bytes=moved)


def norm_of_transformer_engine(shape: Shape) -> Iterator[Case]:
    """Yield Transformer Engine's RMSNorm."""
    from transformer_engine.pytorch import RMSNorm

    layer = RMSNorm(shape.H, eps=1e-5, params_dtype=torch.bfloat16, device=shape.device)
    x = shape.random(shape.tokens, shape.H, grad=True)
    yield from forward_and_backward(
        "te", lambda: layer(x), [x, layer.weight], moved_bytes=4 * x.numel()
    )


GROUPS: list[Group] = [norm, norm_of_transformer_engine]
