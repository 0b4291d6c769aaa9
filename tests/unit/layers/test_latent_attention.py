"""A full DeepSeek-V3 against HuggingFace's: latent attention, groups, bias, shared experts."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.settings import Settings
from moetron.moe.layers.build_model import build_model
from tests.parallel.support.harness import model_parallel

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}


def _reference(q_lora_rank: int | None, rope: dict[str, Any]) -> DeepseekV3ForCausalLM:
    torch.manual_seed(1)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_shared_experts=2,
            n_routed_experts=8,
            routed_scaling_factor=2.5,
            kv_lora_rank=16,
            q_lora_rank=q_lora_rank,
            qk_rope_head_dim=8,
            v_head_dim=12,
            qk_nope_head_dim=16,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=4,
            first_k_dense_replace=1,
            initializer_range=0.3,
            rope_parameters=rope,
        )
    )
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(8) / 5)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def _settings(q_lora_rank: int | None, attention: dict[str, Any]) -> Settings:
    return Settings.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "ffn_hidden_size": 48,
                "seq_length": 24,
                "norm_epsilon": 1e-6,
                "qk_layernorm": True,
                "make_vocab_size_divisible_by": 64,
            },
            "attention": {
                "multi_latent_attention": True,
                "q_lora_rank": q_lora_rank,
                "kv_lora_rank": 16,
                "qk_head_dim": 16,
                "qk_pos_emb_head_dim": 8,
                "v_head_dim": 12,
                **attention,
            },
            "moe": {
                "num_experts": 8,
                "moe_layer_freq": [0, 1],
                "moe_ffn_hidden_size": 16,
                "moe_router_topk": 4,
                "moe_router_score_function": "sigmoid",
                "moe_router_enable_expert_bias": True,
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
                "moe_router_topk_scaling_factor": 2.5,
                "moe_shared_expert_intermediate_size": 32,
            },
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
            "learning_rate": {"lr": 1e-3},
        }
    )


ATTENTION = {
    "linear_q_proj.weight": "q_proj.weight",
    "linear_q_down_proj.weight": "q_a_proj.weight",
    "q_layernorm.weight": "q_a_layernorm.weight",
    "linear_q_up_proj.weight": "q_b_proj.weight",
    "linear_kv_down_proj.weight": "kv_a_proj_with_mqa.weight",
    "kv_layernorm.weight": "kv_a_layernorm.weight",
    "linear_kv_up_proj.weight": "kv_b_proj.weight",
    "linear_proj.weight": "o_proj.weight",
}
FFN = {"linear_fc2.weight": "down_proj.weight"}
EXPERTS = {
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.experts.weight1": "mlp.experts.gate_up_proj",
    "mlp.experts.weight2": "mlp.experts.down_proj",
}


def _fused(theirs: dict[str, torch.Tensor], folder: str) -> torch.Tensor:
    return torch.cat([theirs[f"{folder}.{half}_proj.weight"] for half in ("gate", "up")])


def _fill(model: GPTModel, theirs: dict[str, torch.Tensor]) -> None:
    """Copy HuggingFace's weights; each of our weights must have a counterpart."""
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }
    for layer in range(2):
        to, source = f"decoder.layers.{layer}", f"model.layers.{layer}"
        pairs = {f"self_attention.{a}": f"self_attn.{b}" for a, b in ATTENTION.items()}
        pairs["input_layernorm.weight"] = "input_layernorm.weight"
        pairs["pre_mlp_layernorm.weight"] = "post_attention_layernorm.weight"
        dense, folder = ("mlp", "mlp") if layer == 0 else ("mlp.shared_experts",) * 2
        pairs |= {f"{dense}.{a}": f"{folder}.{b}" for a, b in FFN.items()}
        pairs |= EXPERTS if layer else {}
        ours[f"{to}.{dense}.linear_fc1.weight"] = _fused(theirs, f"{source}.{folder}")
        for a, b in pairs.items():
            if f"{source}.{b}" in theirs:
                ours[f"{to}.{a}"] = theirs[f"{source}.{b}"]
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = {name for name in named if "local_tokens" not in name and "cached" not in name}
    assert ours.keys() == wanted
    with torch.no_grad():
        for name, value in ours.items():
            named[name].copy_(value)


@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("rope", ["rope", "yarn"])
def test_logits_equal_huggingface(q_lora_rank: int | None, rope: str) -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    reference = _reference(q_lora_rank, YARN if rope == "yarn" else plain)
    scaling = {name: YARN[name] for name in YARN.keys() - {"rope_theta", "factor"}}
    attention = {**scaling, "rotary_scaling_factor": 4.0} if rope == "yarn" else {}
    settings = _settings(q_lora_rank, attention)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(3))
    with model_parallel(), torch.no_grad():
        model = build_model(settings, transformer_config(settings), 64).eval()
        _fill(model, reference.state_dict())
        logits = model(tokens, torch.arange(24).expand(2, -1), None)
        torch.testing.assert_close(logits, reference(tokens).logits, rtol=1e-4, atol=1e-4)
