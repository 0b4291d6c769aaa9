"""Roles of settings, against the lists that they replaced."""

from typing import Any

import pytest

from moetron.moe.checkpoint.compatibility import FUNCTION, SHAPE
from moetron.moe.config import bridge
from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.roles import Role, Shape, role_of
from moetron.moe.config.schema.settings import EXPORTED, ROLES, Settings, fields
from moetron.moe.convert.families.family import OTHER_GROUPS

MODEL_GROUPS = ("model", "attention", "moe")


def names(text: str) -> set[str]:
    return set(text.split())


SHAPES = {
    "model": names(
        """num_layers encoder_num_layers relative_attention_num_buckets hidden_size
        num_attention_heads num_query_groups kv_channels ffn_hidden_size
        ffn_type normalization norm_affine qk_layernorm qk_layernorm_scope swiglu add_bias_linear
        untie_embeddings_and_output_weights mtp_num_layers"""
    ),
    "attention": names(
        """add_qkv_bias multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim
        qk_pos_emb_head_dim v_head_dim"""
    ),
    "moe": names(
        """num_experts moe_layer_freq moe_layer_position first_k_dense_replace moe_ffn_hidden_size
        moe_router_enable_expert_bias moe_router_type moe_global_aux_loss_counts
        moe_shared_expert_intermediate_size moe_shared_expert_gate moe_sequential_ffn_hidden_size
        moe_expert_multiplicative_bias"""
    ),
}
FUNCTIONS = {
    "model": names(
        """position_embedding_type relative_attention_max_distance rotary_base rotary_percent
        norm_epsilon"""
    ),
    "attention": names(
        """softmax_scale rope_type rotary_scaling_factor original_max_position_embeddings beta_fast
        beta_slow mscale mscale_all_dim"""
    ),
    "moe": names(
        """moe_router_topk moe_router_pre_softmax moe_router_score_function
        moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk"""
    ),
    "optimizer": {"optimizer"},
}
LOGITS = names("log_max_attention_logit qk_clip qk_clip_threshold qk_clip_alpha")
UNEXPORTED = {
    "model": names(
        """init_method init_method_cutoff init_method_scale embedding_init_method_std
        query_init_folds_scale scaled_output_init hidden_dropout attention_dropout
        make_vocab_size_divisible_by transformer_impl attention_backend mtp_num_layers
        mtp_loss_scaling_factor output_z_loss_coeff label_smoothing"""
    ),
    "attention": LOGITS,
    "moe": names(
        """moe_router_dtype moe_router_bias_update_rate moe_router_init_method_std
        moe_expert_dropout moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff
        moe_input_jitter_eps moe_global_aux_loss_counts moe_aux_loss_first_choice_only
        moe_capacity_scope moe_expert_capacity_factor moe_eval_capacity_factor moe_minimum_capacity
        moe_encoder_capacity_factor moe_encoder_eval_capacity_factor
        moe_capacity_includes_topk moe_pad_expert_input_to_capacity moe_token_drop_policy
        moe_token_dispatcher_type moe_grouped_gemm moe_experts_impl moe_shared_expert_overlap"""
    ),
}
CARRIED_EXPERTS = names(
    """moe_router_topk moe_router_score_function moe_router_topk_scaling_factor
    moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias
    moe_router_bias_update_rate moe_router_type moe_expert_choice_eval moe_second_expert_threshold
    moe_router_temperature moe_router_final_temperature moe_router_anneal_samples
    moe_aux_loss_coeff moe_aux_loss_first_choice_only moe_global_aux_loss_counts moe_z_loss_coeff
    moe_input_jitter_eps moe_expert_capacity_factor moe_eval_capacity_factor moe_minimum_capacity
    moe_encoder_capacity_factor moe_encoder_eval_capacity_factor
    moe_capacity_includes_topk moe_capacity_scope moe_pad_expert_input_to_capacity
    moe_token_drop_policy moe_token_dispatcher_type moe_grouped_gemm
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_expert_multiplicative_bias
    moe_expert_dropout moe_shared_expert_overlap"""
)
REPLACED_EXPERTS = names(
    """moe_layer_freq moe_ffn_hidden_size moe_router_pre_softmax moe_router_dtype
    moe_router_load_balancing_type"""
)
"""Settings of a name in megatron-core whose value bridge.py computes."""
CARRIED_PRECISION = names(
    """fp8_recipe fp8_margin fp8_amax_history_len fp8_amax_compute_algo first_last_layers_bf16
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 bf16"""
)
CARRIED_MODEL = names(
    """num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size
    normalization norm_affine qk_layernorm add_bias_linear init_method_std init_method
    embedding_init_method_std mtp_num_layers mtp_loss_scaling_factor output_z_loss_coeff
    label_smoothing
    hidden_dropout attention_dropout transformer_impl attention_backend"""
)
CARRIED_PERFORMANCE = names(
    """cross_entropy_loss_fusion cross_entropy_fusion_impl moe_permute_fusion moe_router_fusion
    moe_router_padding_for_quantization cuda_graph_impl cuda_graph_warmup_steps
    overlap_moe_expert_parallel_comm ep_overlap_early_attn_memory_release delay_wgrad_compute
    tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
    tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_bootstrap_backend"""
)
REPLACED_PERFORMANCE = names(
    """bias_dropout_fusion masked_softmax_fusion gradient_accumulation_fusion
    cuda_graph_scope"""
)
CARRIED_PARALLEL = names(
    """tensor_model_parallel_size pipeline_model_parallel_size pipeline_model_parallel_layout
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    expert_model_parallel_size expert_tensor_parallel_size context_parallel_size sequence_parallel
    recompute_granularity recompute_method recompute_num_layers recompute_modules"""
)


def sets(lists: dict[str, tuple[str, ...]]) -> dict[str, set[str]]:
    return {group: set(found) for group, found in lists.items()}


def test_settings_that_a_checkpoint_fixes() -> None:
    assert sets(SHAPE) == SHAPES
    assert sets(FUNCTION) == FUNCTIONS


def test_settings_that_a_converted_model_shows() -> None:
    for group in MODEL_GROUPS:
        of_group = {name for other, name, _ in fields() if other == group}
        assert of_group - {name for other, name in EXPORTED if other == group} == UNEXPORTED[group]
    assert set(Settings.model_fields) - OTHER_GROUPS == set(MODEL_GROUPS)


def test_settings_that_change_without_a_report() -> None:
    groups = ("checkpoint", "logging", "profiling", "validation", "watch")
    of_run = {(group, name) for group, name, _ in fields() if group in groups}
    found = {key for key, role in ROLES.items() if role is Role.RUN}
    assert found == of_run | {("data", "tokenizer_model"), ("attention", "log_max_attention_logit")}


@pytest.mark.parametrize("group", MODEL_GROUPS)
def test_every_field_of_the_model_names_its_role(group: str) -> None:
    kind: Any = Settings.model_fields[group].annotation
    assert kind.default_role is None
    assert all(role_of(field, None) for field in kind.model_fields.values())


def test_a_field_without_a_role_is_refused() -> None:
    class Example(Group):
        width: Shape[int] = 1
        depth: int = 1

    assert role_of(Example.model_fields["width"], None) is Role.SHAPE
    assert role_of(Example.model_fields["depth"], Role.TRAINING) is Role.TRAINING
    with pytest.raises(TypeError, match="needs a role"):
        role_of(Example.model_fields["depth"], None)


def carried(group: str, config: type[bridge.ModelConfig] = bridge.ModelConfig) -> set[str]:
    kind: Any = Settings.model_fields[group].annotation
    return set(bridge.same_names(kind.model_construct(**dict.fromkeys(kind.model_fields)), config))


def test_settings_that_megatron_core_has_by_the_same_name() -> None:
    assert carried("moe") == CARRIED_EXPERTS | REPLACED_EXPERTS
    assert carried("precision") == CARRIED_PRECISION
    assert carried("model") == CARRIED_MODEL
    assert carried("parallel") == CARRIED_PARALLEL
    assert carried("performance") == CARRIED_PERFORMANCE | REPLACED_PERFORMANCE
    plain = {"add_qkv_bias", "softmax_scale", "multi_latent_attention"}
    assert carried("attention") == plain | LOGITS
    latent: Any = Settings.model_fields["attention"].annotation
    assert carried("attention", bridge.LatentModelConfig) == set(latent.model_fields)
    rotary = carried("model", bridge.LatentModelConfig) - carried("model")
    assert rotary == {"rotary_base", "rotary_percent"}
