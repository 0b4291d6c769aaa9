"""Parameter counts, against published and hand-computed ones, and sums of shards."""

from pathlib import Path
from typing import Any

import pytest

from moetron.moe.config import recipe
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.parameters import count_parameters, per_rank

OLMOE = Path(__file__).resolve().parents[3] / "examples" / "olmoe_1b_7b" / "pretrain.yaml"


def settings(
    model: dict[str, Any],
    moe: dict[str, Any],
    attention: dict[str, Any] | None = None,
    **parallel: Any,
) -> Settings:
    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "seq_length": 16}
    return Settings.model_validate(
        {
            "model": {**shape, "make_vocab_size_divisible_by": 1, **model},
            "attention": attention or {},
            "moe": moe,
            "parallel": parallel,
            "training": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 8},
            "learning_rate": {"lr": 1e-3},
        }
    )


def test_olmoe_1b_7b() -> None:
    olmoe = Settings.model_validate(recipe.read(OLMOE))
    count = count_parameters(olmoe, 50280)
    assert count.total == 6_919_161_856
    assert count.active == 1_282_017_280
    assert count.embedding == 2 * 103_022_592
    assert sum(count.parts.values()) == count.total


def test_a_dense_model_by_hand() -> None:
    dense = settings({"ffn_hidden_size": 6, "num_query_groups": 2}, {})
    count = count_parameters(dense, 10)
    # Per layer: q and o 8x8, k and v 8x4 each; gate, up, down 8x6; two norms of 8.
    assert count.parts["attention"] == 2 * (64 + 64 + 32 + 32)
    assert count.parts["dense_ffn"] == 2 * 3 * 48
    assert count.parts["norms"] == 2 * 16 + 8
    assert count.parts["embedding"] == count.parts["output"] == 80
    assert count.active == count.total == 384 + 288 + 40 + 160


def test_a_mixed_model_with_biases_by_hand() -> None:
    mixed = settings(
        {
            "add_bias_linear": True, "normalization": "LayerNorm", "swiglu": False,
            "ffn_hidden_size": 6, "kv_channels": 3, "qk_layernorm": True,
            "untie_embeddings_and_output_weights": False,
        },
        {
            "num_experts": 4, "moe_router_topk": 3, "moe_layer_freq": [0, 1],
            "moe_ffn_hidden_size": 5, "moe_shared_expert_intermediate_size": 7,
        },
    )  # fmt: skip
    count = count_parameters(mixed, 10)
    attention = 8 * 36 + 36 + 12 * 8 + 8
    norms = 2 * 16 + 2 * 6  # two norms of 8, q and k norm of 3, each with a bias
    expert = 8 * 5 + 5 + 5 * 8 + 8
    assert count.parts["attention"] == 2 * attention
    assert count.parts["norms"] == 2 * norms + 16
    assert count.parts["dense_ffn"] == 8 * 6 + 6 + 6 * 8 + 8
    assert count.parts["experts"] == 4 * expert
    assert count.parts["router"] == 32
    assert count.parts["shared_experts"] == 8 * 7 + 7 + 7 * 8 + 8
    assert count.parts["output"] == 0
    assert count.total - count.active == expert


LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 6,
    "kv_lora_rank": 4,
    "qk_head_dim": 3,
    "qk_pos_emb_head_dim": 2,
    "v_head_dim": 5,
}


def test_latent_attention_by_hand() -> None:
    count = count_parameters(settings({"qk_layernorm": True}, {}, LATENT), 10)
    queries = 8 * 6 + 6 * 4 * (3 + 2)
    keys_and_values = 8 * (4 + 2) + 4 * 4 * (3 + 5)
    assert count.parts["attention"] == 2 * (queries + keys_and_values + 4 * 5 * 8)
    assert count.parts["norms"] == 2 * (2 * 8 + 6 + 4) + 8
    plain = count_parameters(settings({}, {}, {**LATENT, "q_lora_rank": None}), 10)
    assert plain.parts["attention"] == 2 * (8 * 4 * 5 + keys_and_values + 4 * 5 * 8)


def test_token_prediction_by_hand() -> None:
    """A module has three norms, a projection of twice the width and a layer of the last's kind."""
    moe = {"num_experts": 4, "moe_router_topk": 1, "moe_ffn_hidden_size": 5}
    moe |= {"moe_layer_freq": [0, 1]}
    without = count_parameters(settings({"ffn_hidden_size": 6}, moe), 10)
    count = count_parameters(settings({"ffn_hidden_size": 6, "mtp_num_layers": 2}, moe), 10)
    expert = 3 * 8 * 5
    layer = 2 * 8 + 4 * 64 + 4 * 8 + 4 * expert
    assert count.parts["token_prediction"] == 2 * (3 * 8 + 2 * 64 + layer)
    assert count.main == without.total and count.active == without.active
    assert count.active_ahead == count.parts["token_prediction"] - 2 * 3 * expert


def test_biases_and_gates_by_hand() -> None:
    plain = settings({}, {"num_experts": 2, "moe_shared_expert_intermediate_size": 4})
    gated = {"moe_shared_expert_intermediate_size": 4, "moe_shared_expert_gate": True}
    more = settings({"num_query_groups": 2}, {"num_experts": 2, **gated}, {"add_qkv_bias": True})
    parts, plain_parts = count_parameters(more, 10).parts, count_parameters(plain, 10).parts
    assert parts["shared_experts"] == plain_parts["shared_experts"] + 2 * 8
    assert parts["attention"] == plain_parts["attention"] - 2 * 2 * 32 + 2 * (8 + 4 + 4)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2},
        {"expert_model_parallel_size": 4},
        {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ],
)
def test_shards_add_up(parallel: dict[str, int]) -> None:
    model = {"num_layers": 4, "qk_layernorm": True, "qk_layernorm_scope": "full"}
    moe = {"num_experts": 8, "moe_layer_freq": [1, 1, 0, 1], "moe_ffn_hidden_size": 4}
    sharded = settings(model, moe, **parallel)
    count = count_parameters(sharded, 16)
    tensor = parallel.get("tensor_model_parallel_size", 1)
    experts = parallel.get("expert_model_parallel_size", 1)
    experts *= parallel.get("expert_tensor_parallel_size", tensor)
    stages = parallel.get("pipeline_model_parallel_size", 1)
    held = [per_rank(sharded, 16, stage) for stage in range(stages)]
    assert sum(rank.expert for rank in held) * experts == count.parts["experts"]
    replicated = count.parts["router"] + 9 * 8  # the router, and nine norms of 8
    sharded = count.total - count.parts["experts"] - replicated
    assert sum(rank.dense for rank in held) == sharded // tensor + replicated


def test_interleaved_stages_hold_every_other_layer() -> None:
    moe = {"num_experts": 8, "moe_layer_freq": [1, 0, 1, 0]}
    layout = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    sharded = settings({"num_layers": 4}, moe, **layout)
    assert per_rank(sharded, 16, 0).expert > 0
    assert per_rank(sharded, 16, 1).expert == 0


def test_tied_embeddings_are_on_both_ends_of_a_pipeline() -> None:
    tied = {"untie_embeddings_and_output_weights": False}
    for stages, copies in ((1, 1), (2, 2)):
        sharded = settings(tied, {}, pipeline_model_parallel_size=stages)
        total = sum(per_rank(sharded, 16, stage).dense for stage in range(stages))
        assert total == count_parameters(sharded, 16).total + (copies - 1) * 16 * 8
