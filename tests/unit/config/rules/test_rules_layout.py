"""Rules on partitioning over ranks and on the batch, each triggered alone."""

from typing import Any

import pytest

from tests.unit.config.config_cases import found

PP2 = {"world_size": 2, "pipeline_model_parallel_size": 2}
TP2 = {"world_size": 2, "tensor_model_parallel_size": 2}
KEYS = {"num_attention_heads": 12, "kv_channels": 5, "position_embedding_type": "none"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {
                "world_size": 3,
                "tensor_model_parallel_size": 3,
                "seq_length": 33,
                "global_batch_size": 2,
            },
            "--num-attention-heads 8 is not a multiple of --tensor-model-parallel-size 3: use "
            "--num-attention-heads 6 or 9, or --tensor-model-parallel-size 2 or 4",
        ),
        (
            {"world_size": 4, "tensor_model_parallel_size": 4, **KEYS, "num_query_groups": 6},
            "--num-query-groups 6 is not a multiple of --tensor-model-parallel-size 4",
        ),
        (
            {**TP2, "num_query_groups": 1, "qk_layernorm": True, "qk_layernorm_scope": "full"},
            "several ranks per head need --qk-layernorm-scope head",
        ),
        (
            {**TP2, "num_query_groups": 1, "query_init_folds_scale": True},
            "several ranks per head are incompatible with --query-init-folds-scale",
        ),
        (
            {"world_size": 4, "tensor_model_parallel_size": 4, **KEYS, "num_query_groups": 1},
            "the 70 channels of queries, keys and values are not a multiple of 4",
        ),
        (
            {**TP2, "ffn_hidden_size": 31},
            "--ffn-hidden-size 31 is not a multiple of --tensor-model-parallel-size 2",
        ),
        (
            {**TP2, "moe_ffn_hidden_size": 31},
            "--moe-ffn-hidden-size 31 is not a multiple of --tensor-model-parallel-size 2",
        ),
        (
            {**TP2, "expert_tensor_parallel_size": 2, "moe_ffn_hidden_size": 31},
            "--moe-ffn-hidden-size 31 is not a multiple of --expert-tensor-parallel-size 2",
        ),
        (
            {**TP2, "seq_length": 33},
            "--seq-length 33 must be a multiple of --tensor-model-parallel-size 2",
        ),
        ({**TP2, "sequence_parallel": False}, "drop --no-sequence-parallel"),
        (
            {"world_size": 2, "context_parallel_size": 2, "calculate_per_token_loss": False},
            "--context-parallel-size 2 needs --calculate-per-token-loss",
        ),
        (
            {
                "world_size": 2,
                "context_parallel_size": 2,
                "seq_length": 30,
                "device": "cuda",
                "te": True,
            },
            "--seq-length 30 must be a multiple of 2 x --context-parallel-size 2: use "
            "--seq-length 28 or 32",
        ),
        (
            {**PP2, "num_layers": 3},
            "--num-layers 3 is not a multiple of --pipeline-model-parallel-size 2: use "
            "--num-layers 2 or 4",
        ),
        (
            {"num_layers_per_virtual_pipeline_stage": 1},
            "needs --pipeline-model-parallel-size above 1",
        ),
        (
            {**PP2, "num_layers": 12, "num_layers_per_virtual_pipeline_stage": 4},
            "--num-layers-per-virtual-pipeline-stage 4 does not divide the 6 layers of a stage: "
            "use 3 or 6",
        ),
        (
            {**PP2, "num_layers_per_virtual_pipeline_stage": 1, "global_batch_size": 6},
            "takes its 3 micro-batches in groups of --pipeline-model-parallel-size 2",
        ),
        (
            {**TP2, "world_size": 3},
            "3 rank(s) are not a multiple of --tensor-model-parallel-size 2",
        ),
        (
            {"world_size": 6, "expert_model_parallel_size": 4, "global_batch_size": 12},
            "6 rank(s) are not a multiple of --expert-tensor-parallel-size 1 x "
            "--expert-model-parallel-size 4 x --pipeline-model-parallel-size 1 = 4: start 4 or "
            "8 ranks",
        ),
        (
            {"world_size": 3},
            "--global-batch-size 16 is not a multiple of --micro-batch-size 2 x 3 data-parallel "
            "rank(s) = 6: use --global-batch-size 12 or 18",
        ),
        ({"rampup_batch_size": (16, 2, 100)}, "the start must be below --global-batch-size 16"),
        (
            {"rampup_batch_size": (4, 8, 100)},
            "not an integer number of increments: use an increment of 6 or 12",
        ),
        (
            {"rampup_batch_size": (2, 7, 100)},
            "the increment is not a multiple of --micro-batch-size 2 x 1 data-parallel rank(s) "
            "= 2: use 6 or 8",
        ),
        (
            {**PP2, "num_layers_per_virtual_pipeline_stage": 1, "rampup_batch_size": (4, 4, 100)},
            "is incompatible with virtual pipeline stages",
        ),
        (
            {"use_distributed_optimizer": True, "optimizer": "sgd"},
            "--use-distributed-optimizer needs --optimizer adam, not --optimizer sgd",
        ),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True},
            "--overlap-param-gather needs --use-distributed-optimizer",
        ),
        ({"ddp_bucket_size": 5}, "--ddp-bucket-size 5 has no effect without --overlap-grad-reduce"),
        (
            {"overlap_param_gather": True, "use_distributed_optimizer": True},
            "--overlap-param-gather needs --overlap-grad-reduce",
        ),
    ],
)
def test_rule(changes: dict[str, Any], expected: str) -> None:
    (line,) = found(**changes)
    assert expected in line


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_tensor_ranks_shard_or_replicate_key_heads(groups: int) -> None:
    layout = {"tensor_model_parallel_size": 4, "num_query_groups": groups}
    assert not found(4, **layout)
