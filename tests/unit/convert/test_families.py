"""Matching of models to HuggingFace families, and refusals that name the setting."""

from typing import Any

import pytest

from moetron.common.errors import UserError
from moetron.moe.config.schema.settings import Settings
from moetron.moe.convert.families.family import PLACEHOLDERS, function_of
from moetron.moe.convert.families.registry import FAMILIES, family_named, family_of

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "seq_length": 8,
    "vocab_size": 100,
}
OLMOE: dict[str, dict[str, Any]] = {
    "model": {**SIZES, "qk_layernorm": True, "qk_layernorm_scope": "full"},
    "moe": {"num_experts": 4, "moe_ffn_hidden_size": 8, "moe_router_pre_softmax": True},
}


def values(tree: dict[str, dict[str, Any]], **changes: dict[str, Any]) -> dict[str, Any]:
    merged = {name: {**tree.get(name, {}), **changes.get(name, {})} for name in tree | changes}
    return function_of(Settings.model_validate({**PLACEHOLDERS, **merged}))


@pytest.mark.parametrize(
    ("model_type", "model", "moe"),
    [
        ("olmoe", OLMOE["model"], OLMOE["moe"]),
        ("mixtral", {"num_query_groups": 2}, {"num_experts": 4}),
        (
            "qwen3_moe",
            {"qk_layernorm": True, "kv_channels": 8},
            {"num_experts": 4, "moe_layer_freq": [0, 1]},
        ),
        (
            "qwen2_moe",
            {},
            {
                "num_experts": 4,
                "moe_shared_expert_intermediate_size": 8,
                "moe_shared_expert_gate": True,
            },
        ),
        ("llama", {}, {}),
        ("olmo", {"normalization": "LayerNorm", "norm_affine": False}, {}),
        ("qwen2", {}, {}),
        ("qwen3", {"qk_layernorm": True}, {}),
    ],
)
def test_the_family_is_found(model_type: str, model: dict[str, Any], moe: dict[str, Any]) -> None:
    attention = {"add_qkv_bias": model_type.startswith("qwen2")}
    found = values({"model": {**SIZES, **model}, "moe": moe, "attention": attention})
    assert family_of(found).model_type == model_type


STACKS: dict[str, dict[str, Any]] = {
    "model": {
        **SIZES,
        "num_layers": 6,
        "encoder_num_layers": 2,
        "position_embedding_type": "relative",
        "norm_epsilon": 1e-6,
        "ffn_type": "relu",
    },
    "attention": {"softmax_scale": 1.0},
}
SPARSE = {
    "num_experts": 4,
    "moe_layer_freq": 2,
    "moe_layer_position": "last",
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
}


def test_encoder_decoders_are_found() -> None:
    assert family_of(values(STACKS)).model_type == "t5"
    assert family_of(values(STACKS, model={"ffn_type": "geglu_tanh"})).model_type == "t5"
    assert family_of(values(STACKS, moe=SPARSE)).model_type == "switch_transformers"


@pytest.mark.parametrize(
    ("model", "moe", "flag"),
    [
        ({"ffn_type": "geglu"}, {}, "t5 differs in\n  - --ffn-type geglu: t5 has relu"),
        ({}, {**SPARSE, "moe_router_topk": 2}, "--moe-router-topk 2: switch_transformers has 1"),
        ({}, {**SPARSE, "moe_sequential_ffn_hidden_size": 8}, "--moe-sequential-ffn-hidden-size"),
        ({}, {**SPARSE, "moe_layer_position": "first"}, "--moe-layer-freq 1 0 1 0 1 0"),
    ],
)
def test_other_encoder_decoders_are_refused_by_name(
    model: dict[str, Any], moe: dict[str, Any], flag: str
) -> None:
    with pytest.raises(UserError, match=flag):
        family_of(values(STACKS, model=model, moe=moe))


def test_configurations_of_t5_are_read_or_refused() -> None:
    config = FAMILIES["t5"].config(values(STACKS))
    del config["num_decoder_layers"]
    tree = FAMILIES["t5"].settings(config)
    assert (tree["model"]["num_layers"], tree["model"]["encoder_num_layers"]) == (4, 2)
    for key, value, words in (
        ("feed_forward_proj", "gated-silu", "only relu and gated-gelu are supported"),
        ("scale_decoder_outputs", True, "a tied output is scaled here"),
    ):
        with pytest.raises(UserError, match=words):
            FAMILIES["t5"].settings({**config, key: value})


def test_training_only_settings_are_ignored() -> None:
    changed = {
        "moe_input_jitter_eps": 0.01,
        "moe_expert_capacity_factor": 1.25,
        "moe_aux_loss_coeff": 0.1,
    }
    shape = {"ffn_type": "swiglu", "mtp_num_layers": 1}
    assert values(OLMOE, moe=changed, model=shape) == values(OLMOE)


@pytest.mark.parametrize(
    ("group", "changes", "flag"),
    [
        ("model", {"qk_layernorm_scope": "head"}, "--qk-layernorm-scope head"),
        ("model", {"rotary_percent": 0.5}, "--rotary-percent 0.5"),
        ("model", {"swiglu": False}, "--ffn-type gelu"),
        ("model", {"ffn_type": "double_gated"}, "--ffn-type double_gated"),
        ("model", {"norm_affine": False}, "--norm-affine false"),
        ("model", {"position_embedding_type": "none"}, "--position-embedding-type none"),
        ("attention", {"softmax_scale": 1.0}, "--softmax-scale 1.0"),
        ("attention", {"rope_type": "llama3"}, "--rope-type llama3"),
        ("moe", {"moe_router_type": "expert_choice"}, "--moe-router-type expert_choice"),
        ("moe", {"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-"),
        ("moe", {"moe_router_num_groups": 2}, "--moe-router-num-groups 2"),
        ("moe", {"moe_sequential_ffn_hidden_size": 8}, "--moe-sequential-ffn-hidden-size 8"),
        ("moe", {"moe_expert_multiplicative_bias": True}, "--moe-expert-multiplicative-bias"),
        ("model", {"normalization": "LayerNorm"}, "--normalization LayerNorm"),
        ("moe", {"moe_router_score_function": "sigmoid"}, "--moe-router-score-function sigmoid"),
        ("moe", {"moe_layer_freq": 2}, "--moe-layer-freq 1 0"),
        ("moe", {"moe_shared_expert_intermediate_size": 8}, "--moe-shared-expert-"),
        ("moe", {"moe_router_topk_scaling_factor": 2.0}, "--moe-router-topk-scaling-factor 2.0"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    group: str, changes: dict[str, Any], flag: str
) -> None:
    problems = FAMILIES["olmoe"].problems(values(OLMOE, **{group: changes}))
    assert len(problems) == 1 + (changes == {"moe_layer_freq": 2})  # the dense layer's width
    assert any(problem.startswith(flag) for problem in problems), problems


def test_a_model_of_no_family_gets_the_closest() -> None:
    sigmoid = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
    with pytest.raises(UserError, match=r"olmoe differs in\n.*-function sigmoid: olmoe has soft"):
        family_of(values(OLMOE, moe=sigmoid))
    deepseek = FAMILIES["deepseek_v3"].problems(values(OLMOE, moe=sigmoid))
    assert "--norm-epsilon 1e-05: deepseek_v3 has 1e-06" in deepseek
    assert "--multi-latent-attention false: deepseek_v3 has true" in deepseek
    with pytest.raises(UserError, match=r"olmoe differs in\n  - --rotary-percent 0.5: olmoe has 1"):
        family_of(values(OLMOE, model={"rotary_percent": 0.5}))


def test_sizes_of_a_damaged_record_are_answered_in_words() -> None:
    """More heads than channels: heads of width 0, which `head_dim` cannot express."""
    broken = values(OLMOE, model={"num_attention_heads": 64})
    assert broken["model.kv_channels"] == 0
    [problem] = FAMILIES["qwen3_moe"].problems(broken)
    assert problem == "--kv-channels: Input should be greater than 0"


def test_dense_and_sparse_models_are_different_families() -> None:
    assert FAMILIES["olmoe"].problems(values({"model": OLMOE["model"]})) == [
        "--num-experts None: olmoe is a mixture of experts"
    ]


def test_unsupported_configurations_are_refused() -> None:
    config = FAMILIES["olmoe"].config(values(OLMOE))
    with pytest.raises(UserError, match=r"`clip_qkv` is 8\.0, and only None"):
        FAMILIES["olmoe"].settings({**config, "clip_qkv": 8.0})
    scaled = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="of type `yarn` is not supported"):
        FAMILIES["olmoe"].settings({**config, "rope_parameters": scaled})
    with pytest.raises(UserError, match="`num_experts` is missing"):
        FAMILIES["olmoe"].settings({k: v for k, v in config.items() if k != "num_experts"})
    with pytest.raises(UserError, match=r"`olmo2` is not supported; did you mean olmo"):
        family_named("olmo2")


def test_groups_that_both_sides_rank_differently_are_refused() -> None:
    """megatron-core sums a group's best k/g scores, transformers always its best two."""
    deepseek = FAMILIES["deepseek_v3"]
    config = {
        **deepseek.config(
            values({"model": {**SIZES, "norm_epsilon": 1e-6}, "moe": {"num_experts": 16}})
        ),
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
    }
    assert deepseek.settings(config)["moe"]["moe_router_group_topk"] == 2
    with pytest.raises(UserError, match="num_experts_per_tok 6 is not twice topk_group 2"):
        deepseek.settings({**config, "num_experts_per_tok": 6})


def test_configurations_of_transformers_4_are_read() -> None:
    config = FAMILIES["olmoe"].config(values(OLMOE))
    del config["rope_parameters"]
    tree = FAMILIES["olmoe"].settings({**config, "rope_theta": 5e5, "rope_scaling": None})
    assert tree["model"]["rotary_base"] == 500_000


@pytest.mark.parametrize(
    "family", [name for name, f in FAMILIES.items() if f.experts and not f.has_encoder]
)
def test_no_width_is_null_where_all_layers_have_experts(family: str) -> None:
    """`intermediate_size: null` is refused by transformers 5."""
    config = FAMILIES[family].config(values(OLMOE))
    assert config["intermediate_size"] == 8


def test_widths_not_divisible_by_heads_are_refused_as_by_transformers_5() -> None:
    odd = {"model": {**SIZES, "hidden_size": 18, "kv_channels": 4}}
    with pytest.raises(UserError, match="--hidden-size 18: llama has a multiple of its 4 heads"):
        family_of(values(odd))
    odd["model"]["qk_layernorm"] = True
    assert family_of(values(odd)).model_type == "qwen3"
