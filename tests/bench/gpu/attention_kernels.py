"""Scaled-dot-product attention by backend, with and without grouped queries."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.bench.gpu.kernel_case import Case, Group, Shape, forward_and_backward

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _cases(shape: Shape, groups: int, repeated: bool, seq_first: bool) -> Iterator[Case]:
    """Yield the backends at [B, A, S, head], causal.

    ``groups``: heads of keys and values. ``repeated``: copied to all heads before the call.
    ``seq_first``: in memory [S, B, heads, head], as megatron-core's activations are.
    """
    B, S, A, head = shape.B, shape.S, shape.A, shape.head

    def tensor(heads: int) -> torch.Tensor:
        if seq_first:
            return shape.random(S, B, heads, head, grad=True)
        return shape.random(B, heads, S, head, grad=True)

    inputs = [tensor(A), tensor(groups), tensor(groups)]
    flops = 4 * B * A * S * S * head / 2  # the causal half
    for name, backend in {**_BACKENDS, "torch's choice": None}.items():

        def run(backend: SDPBackend | None = backend) -> torch.Tensor:
            q, k, v = (t.permute(1, 2, 0, 3) if seq_first else t for t in inputs)
            if repeated:
                k, v = (t.repeat_interleave(A // groups, 1) for t in (k, v))
            grouped = groups != A and not repeated
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        yield from forward_and_backward(name, run, inputs, flops, backward_flops=2.5)


def attention(shape: Shape) -> Iterator[Case]:
    """Yield attention with a key head for every query head."""
    yield from _cases(shape, shape.A, repeated=False, seq_first=False)


def attention_seq_first(shape: Shape) -> Iterator[Case]:
    """Yield the same on megatron-core's layout."""
    yield from _cases(shape, shape.A, repeated=False, seq_first=True)


def attention_enable_gqa(shape: Shape) -> Iterator[Case]:
    """Yield attention with a quarter of the key heads, grouped by the kernel."""
    yield from _cases(shape, shape.A // 4, repeated=False, seq_first=False)


def attention_repeated_keys(shape: Shape) -> Iterator[Case]:
    """Yield the same with keys and values repeated before."""
    yield from _cases(shape, shape.A // 4, repeated=True, seq_first=False)


GROUPS: list[Group] = [
    attention,
    attention_seq_first,
    attention_enable_gqa,
    attention_repeated_keys,
]
