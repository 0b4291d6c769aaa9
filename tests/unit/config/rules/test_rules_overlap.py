"""Rules on communication that overlaps with computation (moe/config/rules/performance.py)."""

from pathlib import Path
from typing import Any

import pytest

from moetron.moe.config import bridge
from moetron.moe.config.checks import input_problems
from tests.unit.config.config_cases import found, make

OVERLAP = {
    "world_size": 2,
    "bf16": True,
    "expert_model_parallel_size": 2,
    "overlap_moe_expert_parallel_comm": True,
}
DELAY = {**OVERLAP, "delay_wgrad_compute": True}
TENSOR = {
    "world_size": 2,
    "device": "cuda",
    "te": True,
    "bf16": True,
    "tensor_model_parallel_size": 2,
    "tp_comm_overlap": True,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"delay_wgrad_compute": True}, "needs --overlap-moe-expert-parallel-comm: add it"),
        (
            {"ep_overlap_early_attn_memory_release": True},
            "needs --overlap-moe-expert-parallel-comm",
        ),
        ({**OVERLAP, "expert_model_parallel_size": 1}, "needs --expert-model-parallel-size above"),
        (
            {**OVERLAP, "world_size": 4, "pipeline_model_parallel_size": 2},
            "needs virtual stages: add --num-layers-per-virtual-pipeline-stage",
        ),
        ({**OVERLAP, "bf16": False}, "needs --bf16 (megatron-core): add it"),
        (
            {**OVERLAP, "moe_token_dispatcher_type": "allgather"},
            "is not supported with --moe-token-dispatcher-type allgather: drop one",
        ),
        (
            {**OVERLAP, "moe_sequential_ffn_hidden_size": 32},
            "is not supported with --moe-sequential-ffn-hidden-size 32: drop one",
        ),
        ({**OVERLAP, "mtp_num_layers": 1}, "is not supported with --mtp-num-layers 1: drop one"),
        (
            {
                **OVERLAP,
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            "is not supported with --recompute-granularity full: drop one",
        ),
        (
            {**OVERLAP, "recompute_granularity": "selective", "recompute_modules": ["moe"]},
            "recomputes no full MoE layer: drop moe from --recompute-modules",
        ),
        (
            {**OVERLAP, "moe_router_type": "hash", "moe_aux_loss_coeff": 0.0},
            "needs weights with gradients, not --moe-router-type hash",
        ),
        (
            {**OVERLAP, "tensor_model_parallel_size": 2, "world_size": 4, "hidden_dropout": 0.1},
            "would drop the same values on all tensor ranks",
        ),
        (
            {**OVERLAP, "moe_layer_freq": [1, 1, 1, 0]},
            "leaves out the final norm after a dense layer",
        ),
        (
            {**OVERLAP, "num_experts": 2},
            "frees the tokens of a rank with a single expert before their backward pass",
        ),
        (
            {**DELAY, "fp8_format": "hybrid"},
            "--delay-wgrad-compute with --fp8-format hybrid needs Transformer Engine's layers",
        ),
        (
            {**DELAY, "moe_expert_dropout": 0.1},
            "--delay-wgrad-compute is not supported with --moe-expert-dropout 0.1",
        ),
        (
            {"tp_comm_overlap_rs_dgrad": True},
            "--tp-comm-overlap-rs-dgrad needs --tp-comm-overlap: add it",
        ),
        (
            {"tp_comm_bootstrap_backend": "mpi"},
            "--tp-comm-bootstrap-backend mpi needs --tp-comm-overlap: add it",
        ),
        ({**TENSOR, "te": False}, "needs Transformer Engine's layers on a GPU: leave it out"),
        (
            {**TENSOR, "world_size": 1, "tensor_model_parallel_size": 1},
            "needs --tensor-model-parallel-size above 1 and sequence parallelism",
        ),
        ({**TENSOR, "bf16": False}, "--tp-comm-overlap needs --bf16: the buffers hold it"),
        ({**TENSOR, "mtp_num_layers": 1}, "has no buffers for --mtp-num-layers 1: drop one"),
    ],
)
def test_a_rule_is_reported_alone(changes: dict[str, Any], expected: str) -> None:
    problems = found(**changes)
    assert len(problems) == 1 and expected in problems[0], problems


STAGES = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}


@pytest.mark.parametrize(
    "changes",
    [
        OVERLAP,
        {**OVERLAP, **STAGES, "world_size": 4, "num_layers": 4, "global_batch_size": 8},
        {
            **OVERLAP,
            "recompute_granularity": "selective",
            "ep_overlap_early_attn_memory_release": True,
        },
        {**OVERLAP, "fp8_format": "hybrid"},
        DELAY,
        {**DELAY, "device": "cuda", "te": True, "fp8_format": "hybrid"},
        {**DELAY, "moe_grouped_gemm": False},
        {**OVERLAP, "tensor_model_parallel_size": 2, "num_experts": 2, "world_size": 4},
        TENSOR,
        {**TENSOR, "tp_comm_overlap_rs": False, "tp_comm_bootstrap_backend": "gloo"},
    ],
)
def test_allowed(changes: dict[str, Any]) -> None:
    assert found(**changes) == []


def test_the_file_of_options_exists(tmp_path: Path) -> None:
    chosen = {key: value for key, value in TENSOR.items() if key not in ("world_size", "te")}
    file = tmp_path / "buffers.yaml"
    settings = make(**chosen, tp_comm_overlap_cfg=str(file))
    assert input_problems(settings) == [f"--tp-comm-overlap-cfg {file}: no such file"]
    file.write_text("{}", encoding="utf-8")
    assert input_problems(settings) == []


def test_flags_reach_megatron_core() -> None:
    chosen = {key: value for key, value in DELAY.items() if key != "world_size"}
    settings = make(**chosen, ep_overlap_early_attn_memory_release=True)
    config = bridge.transformer_config(settings)
    assert config.overlap_moe_expert_parallel_comm and config.delay_wgrad_compute
    assert config.ep_overlap_early_attn_memory_release
    assert bridge.ddp_config(settings).delay_wgrad_compute
    assert not bridge.ddp_config(make()).delay_wgrad_compute
