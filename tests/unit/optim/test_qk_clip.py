"""Largest attention logits and QK-clip, on worked examples and in whole models."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.layers.build_model import build_model
from moetron.moe.optim import qk_clip
from moetron.moe.optim.qk_clip import AttentionLogits, clip_factors, largest_logits, row_factors
from tests.parallel.support.harness import model_parallel


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kind", ["causal", "all", "chunk", "prefix"])
def test_largest_logits_equal_those_of_the_full_matrix(
    monkeypatch: pytest.MonkeyPatch, groups: int, kind: str
) -> None:
    """Blocks of 4 of 9 queries; half of a sequence sees the keys of all of it."""
    monkeypatch.setattr(qk_clip, "BLOCK", 4)
    torch.manual_seed(3)
    key = torch.randn(9, 2, groups, 8)
    query = torch.randn(5 if kind == "chunk" else 9, 2, 4, 8)
    allowed, causal = None, kind in ("causal", "chunk")
    if kind == "prefix":
        allowed = (torch.rand(2, 1, 9, 9) > 0.7) | torch.eye(9, dtype=torch.bool)
    found = largest_logits(query, key, 0.3, allowed, causal)
    full = 0.3 * torch.einsum("sbhd,Sbhd->bhsS", query, key.repeat_interleave(4 // groups, dim=2))
    seen = torch.ones(9, 9).tril().bool()[9 - len(query) :] if causal else allowed
    full = full if seen is None else full.masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(found, full.amax((0, 2, 3)))


def test_worked_example() -> None:
    """Two heads of 2 + 1 + 1 rows, S_max 50 and 400, tau 100: gamma 1 and 1/4."""
    gamma = clip_factors(torch.tensor([50.0, 400.0, -3.0]), 100.0)
    assert gamma.tolist() == [1.0, 0.25, 1.0]
    parts = [(gamma[:2] ** 0.5, 2), (gamma[:2] ** 0.5, 1), (torch.ones(2), 1)]
    assert row_factors(parts).tolist() == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 1.0]


def _settings(latent: dict[str, Any] | None, groups: int | None) -> Settings:
    attention = {"qk_clip": True, "qk_clip_threshold": 1.0, "qk_clip_alpha": 0.25}
    if latent is not None:
        sizes = {"kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6}
        attention |= {"multi_latent_attention": True, **sizes, **latent}
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24}
    return Settings.model_validate(
        {
            "model": {**model, "num_query_groups": groups, "init_method_std": 0.3},
            "attention": {**attention, "add_qkv_bias": latent is None},
            "training": {"train_iters": 1, "micro_batch_size": 2, "global_batch_size": 2},
            "learning_rate": {"lr": 1e-3},
        }
    )


def _logits(model: GPTModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.current_max_attn_logits = None
    model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return [
        layer.self_attention.core_attention.current_max_attn_logits
        for layer in model.decoder.layers
    ]


@pytest.mark.parametrize(
    ("latent", "groups"),
    [(None, None), (None, 2), ({"q_lora_rank": None}, None), ({"q_lora_rank": 12}, None)],
)
def test_logits_after_a_clip_are_at_most_the_threshold(
    latent: dict[str, Any] | None, groups: int | None
) -> None:
    """Of the first layer, whose input stays the same, to the value that the formula gives."""
    settings = _settings(latent, groups)
    with model_parallel():
        torch.manual_seed(5)
        model = build_model(settings, transformer_config(settings), 96)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        clip = AttentionLogits([model], ProcessGroupCollection.use_mpu_process_groups(), 1.0, 0.25)
        tokens = torch.randint(96, (2, 24))
        before = _logits(model, tokens)[0]
        assert clip.largest() >= before.max()
        held = {name: each.detach().clone() for name, each in model.named_parameters()}
        for parameter, rows in clip.factors().items():
            parameter.data.mul_(rows.view(-1, *[1] * (parameter.dim() - 1)))
        after = _logits(model, tokens)[0]
    assert (before > 1.0).any()
    of_group = before.view(groups or 4, -1)
    gamma = clip_factors(of_group.amax(1, keepdim=True), 1.0)
    torch.testing.assert_close(after, (of_group * gamma).flatten(), rtol=1e-4, atol=1e-5)
    changed = {n for n, each in model.named_parameters() if not torch.equal(each, held[n])}
    assert all("linear_q" in name or "linear_kv_up" in name for name in changed)
    value = model.decoder.layers[0].self_attention
    if latent is None:
        joint = value.linear_qkv.weight.view(groups or 4, -1, 8, 32)
        same = held["decoder.layers.0.self_attention.linear_qkv.weight"].view_as(joint)
        assert torch.equal(joint[:, -1], same[:, -1])  # values


def test_an_empty_bias_is_none() -> None:
    """Layers of Transformer Engine without biases have a bias of no elements."""
    settings = _settings(None, None)
    with model_parallel():
        model = build_model(settings, transformer_config(settings), 96)
        clip = AttentionLogits([model], ProcessGroupCollection.use_mpu_process_groups(), 1.0, 0.25)
        _logits(model, torch.randint(96, (2, 24)))
        joint = model.decoder.layers[0].self_attention.linear_qkv
        joint.bias = torch.nn.Parameter(torch.empty(0))
        factors = clip.factors()
    assert joint.weight in factors and joint.bias not in factors
