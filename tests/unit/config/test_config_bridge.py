"""Conversion to megatron-core's configurations, which accept all checked settings."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnBackend

from moetron.moe.config import bridge
from tests.unit.config.config_cases import found, make


def test_olmoe_block() -> None:
    config = bridge.transformer_config(
        make(
            moe_router_pre_softmax=True,
            moe_ffn_hidden_size=24,
            moe_aux_loss_coeff=6.25e-4,
            moe_z_loss_coeff=7.8125e-6,
            qk_layernorm=True,
            qk_layernorm_scope="full",
            bf16=True,
        )
    )
    assert config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    assert (config.num_moe_experts, config.moe_ffn_hidden_size) == (8, 24)
    assert (config.moe_aux_loss_coeff, config.moe_z_loss_coeff) == (6.25e-4, 7.8125e-6)
    assert config.moe_router_pre_softmax and config.moe_router_dtype == "fp32"
    assert config.normalization == "RMSNorm" and not config.add_bias_linear
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)
    assert config.bf16 and config.params_dtype == config.pipeline_dtype == torch.bfloat16
    assert config.calculate_per_token_loss
    assert not config.qk_layernorm  # full-width norms are ours; megatron-core's are per head
    assert not config.use_cpu_initialization and not config.deallocate_pipeline_outputs
    fusions = ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion")
    assert not any(getattr(config, fusion) for fusion in fusions)


def test_dense_model() -> None:
    dense = make(num_experts=None, swiglu=False, attention_backend="unfused", qk_layernorm=True)
    config = bridge.transformer_config(dense)
    assert config.num_moe_experts is None and config.ffn_hidden_size == 256
    assert config.qk_layernorm
    assert config.activation_func is torch.nn.functional.gelu and not config.gated_linear_unit
    assert config.attention_backend == AttnBackend.unfused


def test_router_in_the_precision_of_the_parameters() -> None:
    config = bridge.transformer_config(make(moe_router_dtype="params"))
    assert config.moe_router_dtype is None


def test_interleaved_pipelines_overlap_their_sends() -> None:
    plain = bridge.transformer_config(make(pipeline_model_parallel_size=2))
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)
    assert plain.deallocate_pipeline_outputs
    interleaved = bridge.transformer_config(
        make(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    )
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
    assert interleaved.virtual_pipeline_model_parallel_size == 2


def test_tensor_parallelism_brings_sequence_parallelism() -> None:
    config = bridge.transformer_config(make(tensor_model_parallel_size=2))
    assert config.sequence_parallel and config.expert_tensor_parallel_size == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncated_normal(dtype: torch.dtype) -> None:
    config = bridge.transformer_config(
        make(init_method="truncated_normal", scaled_output_init=False, num_layers=16)
    )
    torch.manual_seed(0)
    for method in (
        config.init_method,
        config.output_layer_init_method,
        config.embedding_init_method,
    ):
        weight = method(torch.nn.Parameter(torch.empty(400, 500, dtype=dtype)))
        assert weight.abs().max() <= 0.0601  # bf16 rounds 0.06 up to 0.06006
        assert weight.float().std().item() == pytest.approx(0.01973, rel=0.01)
        assert weight.requires_grad


def test_bf16_weights_are_rounded_fp32_weights() -> None:
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(7)
        drawn.append(bridge.draw_weight_(torch.empty(64, 64, dtype=dtype), 0.02, 3.0))
    assert torch.equal(drawn[0].bfloat16(), drawn[1])


def test_scaled_output_initialisation() -> None:
    config = bridge.transformer_config(make(num_layers=8, init_method_std=0.04))
    torch.manual_seed(0)
    assert config.init_method(torch.empty(500, 500)).std().item() == pytest.approx(0.04, rel=0.01)
    scaled = config.output_layer_init_method(torch.empty(500, 500))
    assert scaled.std().item() == pytest.approx(0.01, rel=0.01)


def test_optimizer_and_gradients() -> None:
    chosen = make(
        bf16=True, weight_decay=0.3, adam_beta2=0.9, clip_grad=0.5, min_lr=1e-5,
        decay_norms_and_biases=True, use_distributed_optimizer=True, overlap_grad_reduce=True,
        overlap_param_gather=True, accumulate_allreduce_grads_in_fp32=False,
    )  # fmt: skip
    config = bridge.optimizer_config(chosen)
    assert (config.lr, config.min_lr, config.weight_decay) == (1e-3, 1e-5, 0.3)
    assert (config.adam_beta1, config.adam_beta2, config.clip_grad) == (0.9, 0.9, 0.5)
    assert config.apply_wd_to_qk_layernorm and config.use_distributed_optimizer
    assert config.bf16 and config.params_dtype == torch.bfloat16 and config.decoupled_weight_decay
    ddp = bridge.ddp_config(chosen)
    assert ddp.use_distributed_optimizer and ddp.overlap_grad_reduce and ddp.overlap_param_gather
    assert not ddp.grad_reduce_in_fp32 and not ddp.average_in_collective


powers = st.sampled_from([1, 2, 4])
models = st.fixed_dictionaries(
    {},
    optional={
        "num_experts": st.sampled_from([None, 4, 8]),
        "moe_router_topk": powers,
        "moe_router_pre_softmax": st.booleans(),
        "moe_router_score_function": st.sampled_from(["softmax", "sigmoid"]),
        "moe_router_enable_expert_bias": st.booleans(),
        "moe_router_load_balancing_type": st.sampled_from(["aux_loss", "sinkhorn", "none"]),
        "moe_aux_loss_coeff": st.sampled_from([0.0, 0.1]),
        "moe_router_num_groups": powers,
        "moe_router_group_topk": powers,
        "moe_expert_capacity_factor": st.sampled_from([None, 1.0]),
        "moe_pad_expert_input_to_capacity": st.booleans(),
        "moe_shared_expert_intermediate_size": st.sampled_from([None, 32]),
        "moe_layer_freq": st.sampled_from([1, 2, [0, 1, 0, 1]]),
        "moe_ffn_hidden_size": st.sampled_from([None, 32]),
        "add_bias_linear": st.booleans(),
        "moe_grouped_gemm": st.booleans(),
        "swiglu": st.booleans(),
        "num_query_groups": powers,
        "tensor_model_parallel_size": powers,
        "pipeline_model_parallel_size": powers,
        "num_layers_per_virtual_pipeline_stage": st.sampled_from([None, 1, 2]),
        "expert_model_parallel_size": powers,
        "expert_tensor_parallel_size": st.sampled_from([None, 1, 2]),
        "sequence_parallel": st.sampled_from([None, True, False]),
        "recompute_granularity": st.sampled_from([None, "full", "selective"]),
        "recompute_method": st.sampled_from([None, "uniform", "block"]),
        "recompute_num_layers": st.sampled_from([None, 1]),
        "recompute_modules": st.sampled_from([None, ["moe"], ["moe_act"]]),
    },
)


@settings(max_examples=150, deadline=None)
@given(models)
@pytest.mark.filterwarnings("ignore")
def test_megatron_core_accepts_what_the_checks_accept(changes: dict[str, Any]) -> None:
    assume(not found(world_size=32, global_batch_size=64, **changes))
    bridge.transformer_config(make(global_batch_size=64, **changes))
