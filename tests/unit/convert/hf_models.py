"""Tiny transformers models, one per family, with random weights that expose every error."""

from pathlib import Path
from typing import Any

import torch
import transformers

from moetron.moe.convert.families.modeling_openmoe import OpenMoeConfig, OpenMoeForCausalLM

transformers.AutoConfig.register("openmoe", OpenMoeConfig)
transformers.AutoModelForCausalLM.register(OpenMoeConfig, OpenMoeForCausalLM)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 48,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "mixtral": {
        "intermediate_size": 24,
        "num_local_experts": 4,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "qwen3_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 12,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 2,
    },
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 12,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "openmoe": {
        "intermediate_size": 40,
        "head_dim": 12,
        "attention_scale": 0.5,
        "moe_layers": [0, 1, 0],
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "extra_intermediate_size": 20,
    },
    "llama": {
        "intermediate_size": 40,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "olmo": {"intermediate_size": 40},
    "qwen2": {"intermediate_size": 40},
    "qwen3": {"intermediate_size": 40, "head_dim": 12},
}


def build(model_type: str, **changes: Any) -> transformers.PreTrainedModel:
    """Return a random model: weights of 0.1, norms and biases away from 1 and 0."""
    config = transformers.AutoConfig.for_model(
        model_type, **{**SIZES, **OF_FAMILY[model_type], **changes}
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.state_dict(keep_vars=True).values()):
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(folder: Path, model_type: str, **changes: Any) -> transformers.PreTrainedModel:
    """Return the same model, saved by transformers."""
    model = build(model_type, **changes)
    model.save_pretrained(folder)
    return model


def loaded(folder: Path) -> transformers.PreTrainedModel:
    """Load a folder with transformers."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()
