"""Which rotations our kernel takes over, and that latent attention calls it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import multi_latent_attention

from moetron.moe.host import kernel_hooks
from moetron.moe.host.adapt import adapt_host, restore_host
from moetron.moe.kernels.rotary import PairLayout

KINDS = ["served", "no kernel", "fusion", "packed", "angles of each sample"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_kernel_serves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_hooks, "uses_triton", lambda _: kind != "no kernel")
    monkeypatch.setattr(kernel_hooks, "rotary", lambda *args: ("ours", *args))
    monkeypatch.setattr(rope_utils, "apply_rotary_pos_emb", lambda *args: ("theirs", *args))
    config: Any = SimpleNamespace(
        apply_rope_fusion=kind == "fusion", multi_latent_attention=True, rotary_interleaved=False
    )
    x, angles = torch.zeros(3, 2, 1, 4), torch.zeros(3, 1, 1, 4)
    if kind == "angles of each sample":
        angles = angles.expand(3, 2, 1, 4)
    lengths = torch.tensor([0, 3]) if kind == "packed" else None
    name, *args = kernel_hooks.rotate(x, angles, config, cu_seqlens=lengths, mscale=0.5)
    if kind == "served":
        assert name == "ours" and args[2:] == [PairLayout(True, False), 0.5]
    else:
        assert name == "theirs" and args[2:5] == [config, lengths, 0.5]


def test_latent_attention_calls_it() -> None:
    restore_host()  # another test of this process may have adapted it
    theirs = multi_latent_attention.apply_rotary_pos_emb
    adapt_host()
    assert multi_latent_attention.apply_rotary_pos_emb is kernel_hooks.rotate
    restore_host()
    assert multi_latent_attention.apply_rotary_pos_emb is theirs
