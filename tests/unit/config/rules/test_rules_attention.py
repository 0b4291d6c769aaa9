"""Latent attention, rotary scaling and multi-token prediction."""

from typing import Any

import pytest

from moetron.moe.config import bridge
from tests.unit.config.config_cases import found, make

LATENT: dict[str, Any] = {"multi_latent_attention": True, "kv_lora_rank": 16}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"q_lora_rank": 8}, "--q-lora-rank 8 needs --multi-latent-attention"),
        ({**LATENT, "kv_channels": 8}, "--kv-channels 8 has no effect with"),
        ({**LATENT, "num_query_groups": 2}, "--num-query-groups 2 has no effect with"),
        ({**LATENT, "softmax_scale": 1.0}, "--softmax-scale 1.0 has no effect with"),
        ({**LATENT, "add_qkv_bias": True}, "--add-qkv-bias: --multi-latent-attention has no"),
        (
            {**LATENT, "qk_layernorm": True, "qk_layernorm_scope": "full"},
            "--qk-layernorm-scope full is incompatible with",
        ),
        ({**LATENT, "position_embedding_type": "none"}, "needs --position-embedding-type rope"),
        ({**LATENT, "qk_pos_emb_head_dim": 7}, "--qk-pos-emb-head-dim 7 must be even"),
        ({**LATENT, "attention_backend": "unfused"}, "is incompatible with --attention-backend"),
        ({"rope_type": "yarn"}, "--rope-type yarn needs --multi-latent-attention"),
        ({**LATENT, "rope_type": "llama3"}, "--rope-type llama3 is incompatible with"),
        ({"rotary_scaling_factor": 4.0}, "--rotary-scaling-factor 4.0 needs --rope-type"),
        ({"moe_shared_expert_gate": True}, "--moe-shared-expert-gate needs --moe-shared-expert-"),
        (
            {
                "mtp_num_layers": 1,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 2,
            },
            "--mtp-num-layers with --recompute-method uniform and --recompute-num-layers 2",
        ),
        (
            {
                "world_size": 2,
                "pipeline_model_parallel_size": 2,
                "mtp_num_layers": 1,
                "untie_embeddings_and_output_weights": False,
            },
            "--pipeline-model-parallel-size 2 needs --untie-embeddings-and-output-weights",
        ),
    ],
)
def test_one_rule(changes: dict[str, Any], rule: str) -> None:
    (problem,) = found(**changes)
    assert rule in problem


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"sequence_parallel": False, "num_experts": None}, "needs sequence parallelism"),
        ({"q_lora_rank": 7}, "--q-lora-rank 7 is not a multiple"),
        ({"kv_lora_rank": 15}, "their sum 79 is not a multiple"),
    ],
)
def test_latent_attention_on_tensor_ranks(changes: dict[str, Any], rule: str) -> None:
    layout = {"tensor_model_parallel_size": 2, "world_size": 2}
    (problem,) = found(**{**LATENT, **layout, **changes})
    assert rule in problem


def test_compatible_settings() -> None:
    assert not found(**LATENT, hidden_size=60, rope_type="yarn", rotary_scaling_factor=4.0)
    assert not found(rope_type="llama3", rotary_scaling_factor=8.0, mtp_num_layers=2)
    block = {"recompute_method": "block", "recompute_num_layers": 2}
    assert not found(recompute_granularity="full", mtp_num_layers=1, **block)


def test_bridge() -> None:
    config = bridge.transformer_config(make(**LATENT, rotary_base=500, mtp_num_layers=2))
    assert config.multi_latent_attention and config.q_lora_rank is None
    assert (config.kv_lora_rank, config.qk_head_dim, config.v_head_dim) == (16, 128, 128)
    assert (config.rope_type, config.rotary_base) == ("rope", 500)
    assert (config.mtp_num_layers, config.mtp_loss_scaling_factor) == (2, 0.1)
    plain = bridge.transformer_config(make(add_qkv_bias=True, softmax_scale=1.0))
    assert plain.add_qkv_bias and plain.softmax_scale == 1.0
    assert not plain.multi_latent_attention and plain.mtp_num_layers is None


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"log_max_attention_logit": True, "attention_backend": "unfused"},
            "--log-max-attention-logit: --attention-backend unfused gives no logits; use sdpa",
        ),
        ({"qk_clip": True, "qk_layernorm": True}, "which undoes any scale"),
        (
            {
                "qk_clip": True,
                "overlap_param_gather": True,
                "overlap_grad_reduce": True,
                "use_distributed_optimizer": True,
            },
            "--qk-clip is incompatible with --overlap-param-gather: drop one",
        ),
        ({"qk_clip": True, "qk_clip_threshold": 50.0, "add_qkv_bias": True}, None),
        ({**LATENT, "qk_clip": True, "qk_layernorm": True}, None),
        ({"log_max_attention_logit": True, "qk_layernorm": True}, None),
    ],
)
def test_largest_logits(changes: dict[str, Any], rule: str | None) -> None:
    problems = found(**changes)
    assert [rule in problem for problem in problems] == ([] if rule is None else [True])
