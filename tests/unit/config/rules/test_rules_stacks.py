"""Rules on encoder-decoders, each triggered alone."""

from typing import Any

import pytest

from tests.unit.config.config_cases import found

STACKS: dict[str, Any] = {
    "encoder_num_layers": 2,
    "encoder_seq_length": 24,
    "position_embedding_type": "relative",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"encoder_num_layers": 4}, "--encoder-num-layers 4 leaves no decoder of --num-layers 4"),
        ({"position_embedding_type": "rope"}, "use --position-embedding-type relative"),
        ({"encoder_seq_length": None}, "needs --encoder-seq-length"),
        ({"encoder_seq_length": 32}, "leaves the decoder nothing of --seq-length 32"),
        ({"examples_per_sample": 5}, "--examples-per-sample 5 does not divide"),
        (
            {"world_size": 2, "tensor_model_parallel_size": 2, "encoder_seq_length": 23},
            "are not both multiples of --tensor-model-parallel-size 2",
        ),
        (
            {"mock_data": False, "data_path": ["x"], "objective": "ul2"},
            "--objective ul2: an encoder-decoder needs span_corruption or prefix_lm",
        ),
        ({"num_query_groups": 4}, "cross-attention has as many key heads as queries"),
        ({"world_size": 2, "context_parallel_size": 2}, "is not supported by encoder-decoders"),
        (
            {
                "world_size": 2,
                "bf16": True,
                "expert_model_parallel_size": 2,
                "overlap_moe_expert_parallel_comm": True,
            },
            "--overlap-moe-expert-parallel-comm is not supported by encoder-decoders",
        ),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1 is not supported by encoder-decoders"),
        ({"eod_mask_loss": True}, "--eod-mask-loss is not supported by encoder-decoders"),
        ({"reset_attention_mask": True}, "--reset-attention-mask is not supported by encoder-"),
        ({"qk_clip": True}, "--qk-clip is not supported by encoder-decoders"),
        (
            {"transformer_impl": "transformer_engine", "te": True, "device": "cuda"},
            "an encoder-decoder has local layers",
        ),
        (
            {"moe_router_type": "hash", "moe_aux_loss_coeff": 0.0},
            "--moe-router-type hash is not supported by encoder-decoders",
        ),
        ({"recompute_granularity": "selective"}, "recomputes core_attn: name other modules"),
        ({"moe_encoder_capacity_factor": 2.0}, "needs --moe-expert-capacity-factor: add it"),
        (
            {
                "world_size": 2,
                "pipeline_model_parallel_size": 2,
                "pipeline_model_parallel_layout": "Etttt|L",
            },
            "the last pipeline chunk of an encoder-decoder needs a layer",
        ),
    ],
)
def test_rule_of_an_encoder_decoder(changes: dict[str, Any], expected: str) -> None:
    problems = found(**{**STACKS, **changes})
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"encoder_seq_length": 16}, "--encoder-seq-length 16 needs --encoder-num-layers"),
        (
            {"moe_encoder_eval_capacity_factor": 2.0, "moe_expert_capacity_factor": 1.0},
            "--moe-encoder-eval-capacity-factor 2.0 needs --encoder-num-layers",
        ),
        ({"objective": "span_corruption"}, "--objective span_corruption is for encoder-decoders"),
        ({"position_embedding_type": "relative"}, "relative needs --encoder-num-layers"),
    ],
)
def test_rule_of_a_decoder(changes: dict[str, Any], expected: str) -> None:
    assert [p for p in found(**changes) if expected in p]


def test_an_encoder_decoder_is_accepted() -> None:
    assert not found(**STACKS)
    assert not found(**STACKS, world_size=2, tensor_model_parallel_size=2)
    assert not found(**STACKS, world_size=4, pipeline_model_parallel_size=4)
