"""Queries and keys from kernels: the same attention as without them."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from moetron.moe.config.bridge import transformer_config
from moetron.moe.kernels.availability import is_interpreted
from moetron.moe.kernels.query_key import HeadLayout
from moetron.moe.kernels.rotary import PairLayout
from moetron.moe.layers import rotary_attention
from moetron.moe.layers.build_model import build_model
from moetron.moe.layers.norm import FullWidthRMSNorm, LayerNorm
from moetron.moe.layers.rotary_attention import RotarySelfAttention
from tests.parallel.support.checkpoint_runs import VOCABULARY, parallel_of, settings

LENGTH = 6


def _rotate(x: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    angles = torch.atan2(table[1], table[0])[:, None, None]
    return _apply_rotary_pos_emb_bshd(x, angles, interleaved)


def _joint(
    mixed: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    table: torch.Tensor,
    layout: HeadLayout,
) -> list[torch.Tensor]:
    """Return what the joint kernel does."""
    s, b, _, row = mixed.shape
    parts = mixed.split([row - 2 * layout.width, layout.width, layout.width], -1)
    heads = [part.reshape(s, b, -1, layout.width) for part in parts]
    for number, weight in enumerate((query_weight, key_weight)):
        if weight is not None:
            flat = heads[number].flatten(2) if layout.full_width else heads[number]
            normed = F.rms_norm(flat, weight.shape, weight, layout.epsilon)
            heads[number] = normed.view_as(heads[number])
    return [*(_rotate(x, table, layout.interleaved) for x in heads[:2]), heads[2]]


def _single(
    x: torch.Tensor, angles: torch.Tensor, layout: PairLayout, scale: float
) -> torch.Tensor:
    """Return what the rotary kernel does."""
    assert layout.source_interleaved == layout.target_interleaved
    return _apply_rotary_pos_emb_bshd(x, angles, layout.source_interleaved, mscale=scale)


NORMS: dict[str, dict[str, Any]] = {
    "none": {"qk_layernorm": False},
    "head": {"qk_layernorm": True},
    "full": {"qk_layernorm": True, "qk_layernorm_scope": "full"},
    "layer": {"qk_layernorm": True, "normalization": "LayerNorm"},
}


@pytest.fixture
def attention(request: pytest.FixtureRequest) -> Iterator[RotarySelfAttention]:
    norm = NORMS[getattr(request, "param", "none")]
    model = {"rotary_percent": 0.5, "num_query_groups": 2, **norm}
    chosen = settings("dp", model=model, precision={"bf16": False})
    with parallel_of(chosen):
        torch.manual_seed(3)
        built = build_model(chosen, transformer_config(chosen), VOCABULARY)
        yield next(m for m in built.modules() if isinstance(m, RotarySelfAttention))


def _run(attention: RotarySelfAttention) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(LENGTH, 2, attention.config.hidden_size, requires_grad=True)
    config = attention.config
    angles = RotaryEmbedding(config.kv_channels, 0.5, config.rotary_interleaved)(LENGTH)
    output, _ = attention(x, None, rotary_pos_emb=angles)
    inputs = [x, *attention.parameters()]
    return [output, *torch.autograd.grad(output.square().sum(), inputs)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("attention", NORMS, indirect=True)
def test_kernels_give_what_megatron_gives(
    attention: RotarySelfAttention, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.config.rotary_interleaved = interleaved
    with monkeypatch.context() as patch:
        patch.setattr(rotary_attention, "uses_triton", lambda _: False)
        expected = _run(attention)
    calls: list[str] = []
    kernels: dict[str, Any] = {"query_key": _joint, "rotary": _single}
    for name, in_torch in kernels.items():
        used = getattr(rotary_attention, name) if is_interpreted() else in_torch

        def call(*args: Any, name: str = name, used: Any = used) -> Any:
            calls.append(name)
            return used(*args)

        monkeypatch.setattr(rotary_attention, name, call)
    monkeypatch.setattr(rotary_attention, "uses_triton", lambda _: True)
    for ours, theirs in zip(_run(attention), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    separate = isinstance(attention.q_layernorm, LayerNorm)
    assert calls == (["rotary", "rotary"] if separate else ["query_key"])


@pytest.mark.parametrize("attention", ["full"], indirect=True)
def test_a_norm_over_several_ranks_stays_apart(attention: RotarySelfAttention) -> None:
    assert attention._norm_has_kernel()
    assert isinstance(attention.q_layernorm, FullWidthRMSNorm)
    attention.q_layernorm.tp_group = SimpleNamespace(size=lambda: 2)  # type: ignore[assignment]
    assert not attention._norm_has_kernel()


@pytest.mark.parametrize("kind", ["no kernel", "fusion", "packed", "no positions in some layers"])
def test_other_attention_stays_megatrons(
    attention: RotarySelfAttention, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, angles = torch.empty(6, 2, 4), torch.empty(6, 1, 1, 4)
    monkeypatch.setattr(rotary_attention, "uses_triton", lambda _: True)
    assert attention._has_kernel(x, angles, {})
    assert not attention._has_kernel(x, (angles, angles), {})
    assert not attention._has_kernel(x, None, {})
    assert not attention._has_kernel(x, angles.expand(6, 2, 1, 4), {})
    monkeypatch.setattr(rotary_attention, "uses_triton", lambda _: kind != "no kernel")
    attention.config.apply_rope_fusion = kind == "fusion"
    attention.config.no_rope_freq = [0] if kind == "no positions in some layers" else None
    options = {"packed_seq_params": SimpleNamespace() if kind == "packed" else None}
    assert not attention._has_kernel(x, angles, options)
