"""Where queries and keys are rotated: the same attention with the kernel and without it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from moetron.moe.config.bridge import transformer_config
from moetron.moe.kernels.rotary import PairLayout
from moetron.moe.layers import rotary_attention
from moetron.moe.layers.build_model import build_model
from moetron.moe.layers.rotary_attention import RotarySelfAttention
from tests.parallel.support.checkpoint_runs import VOCABULARY, parallel_of, settings


def _in_torch(
    x: torch.Tensor, angles: torch.Tensor, layout: PairLayout, scale: float
) -> torch.Tensor:
    """Return what the kernel does."""
    assert layout.source_interleaved == layout.target_interleaved
    return _apply_rotary_pos_emb_bshd(x, angles, layout.source_interleaved, mscale=scale)


@pytest.fixture
def attention() -> Any:
    chosen = settings("dp", model={"rotary_percent": 0.5}, precision={"bf16": False})
    with parallel_of(chosen):
        torch.manual_seed(3)
        model = build_model(chosen, transformer_config(chosen), VOCABULARY)
        yield next(m for m in model.modules() if isinstance(m, RotarySelfAttention))


def _run(attention: RotarySelfAttention, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(6, 2, attention.config.hidden_size, requires_grad=True)
    angles = RotaryEmbedding(attention.config.kv_channels, rotary_percent=0.5)(6)
    output, _ = attention(x, None, rotary_pos_emb=angles, **options)
    return output, torch.autograd.grad(output.square().sum(), x)[0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_kernel_rotates_as_megatron_does(
    attention: RotarySelfAttention, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention.config.rotary_interleaved = interleaved
    expected = _run(attention)
    calls: list[torch.Size] = []
    monkeypatch.setattr(rotary_attention, "uses_triton", lambda _: True)
    monkeypatch.setattr(
        rotary_attention, "rotary", lambda x, *rest: calls.append(x.shape) or _in_torch(x, *rest)
    )
    for ours, theirs in zip(_run(attention), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) == 2  # queries and keys


@pytest.mark.parametrize("kind", ["no kernel", "fusion", "packed", "no positions in some layers"])
def test_other_attention_stays_megatrons(
    attention: RotarySelfAttention, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary_attention, "uses_triton", lambda _: kind != "no kernel")
    attention.config.apply_rope_fusion = kind == "fusion"
    attention.config.no_rope_freq = [0] if kind == "no positions in some layers" else None
    options = {"packed_seq_params": SimpleNamespace() if kind == "packed" else None}
    x, angles = torch.empty(6, 2, 4), torch.empty(6, 1, 1, 4)
    assert not attention._has_kernel(x, angles, options)
    assert not attention._has_kernel(x, (angles, angles), {})
    assert not attention._has_kernel(x, None, {})
    assert not attention._has_kernel(x, angles.expand(6, 2, 1, 4), {})
