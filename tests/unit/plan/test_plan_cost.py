"""FLOPs, memory, rank positions and the rendered plan."""

import math
from typing import Any

import pytest
from test_plan_parameters import OLMOE, settings

from moetron.moe.config import recipe
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.flops import flops_per_token
from moetron.moe.plan.hardware import peak_tflops_per_s
from moetron.moe.plan.layout import position
from moetron.moe.plan.memory import memory_per_rank
from moetron.moe.plan.parameters import count_parameters, per_rank
from moetron.moe.plan.render import render


def test_flops_by_hand() -> None:
    dense = settings({"ffn_hidden_size": 6}, {})
    # 2 layers of 4 x 8x8 and 3 x 8x6, output 10x8; attention 6 x 2 layers x 16 tokens x 8 channels.
    assert flops_per_token(dense, 10) == 6 * (2 * (256 + 144) + 80) + 6 * 2 * 16 * 8
    tied = settings({"ffn_hidden_size": 6, "untie_embeddings_and_output_weights": False}, {})
    assert flops_per_token(tied, 10) == flops_per_token(dense, 10)


def test_only_selected_experts_cost_flops() -> None:
    few, many = (
        settings({}, {"num_experts": experts, "moe_router_topk": 2, "moe_ffn_hidden_size": 4})
        for experts in (4, 8)
    )
    router = 2 * 4 * 8  # four more rows of 8 in two layers
    assert flops_per_token(many, 10) - flops_per_token(few, 10) == 6 * router


@pytest.mark.parametrize(
    ("precision", "optimizer", "bytes_each"),
    [
        ({}, {}, (4, 4, 8)),
        ({"bf16": True}, {}, (2, 4, 12)),
        ({"bf16": True, "accumulate_allreduce_grads_in_fp32": False}, {}, (2, 2, 12)),
        ({"bf16": True}, {"use_precision_aware_optimizer": True}, (2, 4, 10)),
        (
            {"bf16": True, "accumulate_allreduce_grads_in_fp32": False},
            {
                "use_precision_aware_optimizer": True,
                "exp_avg_dtype": "fp8",
                "exp_avg_sq_dtype": "bf16",
            },
            (2, 2, 5),
        ),
        ({}, {"optimizer": "sgd"}, (4, 4, 4)),
        ({}, {"optimizer": "sgd", "sgd_momentum": 0}, (4, 4, 0)),
    ],
)
def test_bytes_of_the_states(
    precision: dict[str, bool], optimizer: dict[str, object], bytes_each: tuple[int, int, int]
) -> None:
    plain = settings({}, {"num_experts": 4})
    tree = {**plain.model_dump(), "precision": precision, "optimizer": optimizer}
    chosen = Settings.model_validate(tree)
    memory = memory_per_rank(chosen, 16, 1, 0)
    count = count_parameters(chosen, 16).total
    states = (memory.parameters, memory.gradients, memory.optimizer)
    assert states == tuple(count * each for each in bytes_each)
    assert memory.logits == 2 * 4 * 16 * 16
    assert memory.total == sum(states) + memory.activations + memory.logits


def test_offloaded_state_takes_no_memory_of_the_device() -> None:
    tree = settings({}, {"num_experts": 4}).model_dump()
    tree |= {"precision": {"bf16": True}, "optimizer": {"use_precision_aware_optimizer": True}}
    for fraction, each in ((1.0, 0), (0.5, 6)):
        offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
        chosen = Settings.model_validate({**tree, "performance": offload})
        count = count_parameters(chosen, 16).total
        assert memory_per_rank(chosen, 16, 1, 0).optimizer == count * each


def test_muon_keeps_one_moment_of_hidden_matrices() -> None:
    moe = {"num_experts": 4, "moe_ffn_hidden_size": 5}
    plain = settings({"add_bias_linear": True, "untie_embeddings_and_output_weights": True}, moe)
    tree = {**plain.model_dump(), "optimizer": {"optimizer": "muon"}}
    chosen = Settings.model_validate(tree)
    # Per layer: 4 of 8x8 in attention, the router's 4x8, 4 experts with 3 of 8x5.
    matrices = 2 * (4 * 64 + 32 + 4 * 3 * 40)
    total = count_parameters(chosen, 16).total
    assert memory_per_rank(chosen, 16, 1, 0).optimizer == 4 * (2 * total - matrices)
    tree["precision"] = {"bf16": True}
    with_mains = Settings.model_validate(tree)
    assert memory_per_rank(with_mains, 16, 1, 0).optimizer == 4 * (3 * total - matrices)


def test_the_distributed_optimizer_shards_dense_and_expert_states_separately() -> None:
    layout = {"expert_model_parallel_size": 4, "use_distributed_optimizer": True}
    chosen = settings({}, {"num_experts": 4}, **layout)
    held = per_rank(chosen, 16, 0)
    memory = memory_per_rank(chosen, 16, 8, 0)
    assert memory.optimizer == 8 * (held.dense // 8 + held.expert // 2)


def test_recomputation_and_pipelines_change_activations() -> None:
    moe = {"num_experts": 4}
    plain = memory_per_rank(settings({}, moe), 16, 1, 0).activations
    full = {"recompute_method": "uniform", "recompute_num_layers": 1}
    recomputed = settings({}, moe, recompute_granularity="full", **full)
    # Two inputs of 16 x 8 numbers, and one layer (half of all) while it is recomputed.
    assert memory_per_rank(recomputed, 16, 1, 0).activations == plain // 2 + 2 * 4 * 16 * 8
    piped = settings({}, moe, pipeline_model_parallel_size=2)
    stages = [memory_per_rank(piped, 16, 2, stage).activations for stage in (0, 1)]
    assert stages == [plain, plain // 2]  # two micro-batches of one layer, and one


def test_positions_of_ranks_are_megatrons() -> None:
    from megatron.core.parallel_state import RankGenerator

    tp, cp, dp, pp, ep, etp, edp = 2, 2, 2, 3, 4, 1, 2
    chosen = settings(
        {"num_layers": 3},
        {"num_experts": 4},
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    world, order = tp * cp * dp * pp, "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    expert = RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order=order)
    for name, generator, group in (
        ("tensor", dense, "tp"), ("context", dense, "cp"), ("data", dense, "dp"),
        ("pipeline", dense, "pp"), ("expert", expert, "ep"), ("expert_data", expert, "dp"),
        ("expert_tensor", expert, "tp"),
    ):  # fmt: skip
        for ranks in generator.get_ranks(group):
            places = [getattr(position(chosen, world, rank), name) for rank in ranks]
            assert places == list(range(len(ranks))), (name, ranks)


def _activations(model: dict[str, Any], moe: dict[str, Any], **parallel: Any) -> int:
    return memory_per_rank(settings(model, moe, **parallel), 16, 2, 0).activations // 4


def test_recomputed_modules_are_not_kept() -> None:
    """Values are elements per token and layer, of which there are 2 x 16; H = 8, expert F = 4."""
    model, moe = {}, {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 4}
    plain = _activations(model, moe)

    def saved(*modules: str, **changes: Any) -> float:
        chosen = {"recompute_granularity": "selective", "recompute_modules": list(modules)}
        full = _activations({**model, **changes}, moe) if changes else plain
        return (full - _activations({**model, **changes}, moe, **chosen)) / (2 * 16)

    assert saved("layernorm") == 2 * 8
    assert saved("moe_act") == 2 * 4
    assert saved("moe") == 2 * (2 * 8 + 3 * 4)
    assert saved("mlp") == saved("core_attn") == 0
    assert saved("core_attn", attention_backend="unfused") == 2 * 4 * 16  # heads, keys


def test_full_recomputation_in_units_and_blocks() -> None:
    model = {"num_layers": 4}
    full, one_input = _activations(model, {}), 16 * 8
    layer = full // 4

    def full(method: str, layers: int) -> int:
        chosen = {"recompute_method": method, "recompute_num_layers": layers}
        return _activations(model, {}, recompute_granularity="full", **chosen)

    assert full("uniform", 1) == 4 * one_input + layer
    assert full("uniform", 2) == 2 * one_input + 2 * layer
    assert full("block", 3) == 3 * one_input + layer + layer


def test_block_recomputation_excludes_token_prediction() -> None:
    model = {"num_layers": 2, "mtp_num_layers": 1}
    plain, one_input = _activations({"num_layers": 2}, {}), 16 * 8
    predictor = _activations(model, {}) - plain

    def full(layers: int) -> int:
        chosen = {"recompute_method": "block", "recompute_num_layers": layers}
        return _activations(model, {}, recompute_granularity="full", **chosen)

    assert full(2) == full(3) == 2 * one_input + plain // 2 + predictor


def test_capacity_without_k_keeps_fewer_tokens() -> None:
    moe = {"num_experts": 4, "moe_router_topk": 2, "moe_expert_capacity_factor": 1.0}
    dropless = _activations({}, {"num_experts": 4, "moe_router_topk": 2})
    assert _activations({}, moe) == dropless
    once = _activations({}, {**moe, "moe_capacity_includes_topk": False})
    visit = 2 * 8 + 3 * 32
    assert dropless - once == 2 * 16 * visit
    padded = {"moe_capacity_includes_topk": False, "moe_pad_expert_input_to_capacity": True}
    assert _activations({}, {**moe, **padded, "moe_expert_capacity_factor": 3.0}) == (
        dropless + 2 * 16 * visit
    )


def test_ranks_that_share_a_key_head_keep_the_full_projection() -> None:
    """16 x 2 positions of two layers: a head is 8 / 4 wide, the projection 4 + 2 of them."""
    model = {"num_attention_heads": 4, "num_query_groups": 1}
    alone = _activations(model, {})
    rank = _activations(model, {}, tensor_model_parallel_size=2)
    copied_key_and_value = 2 * 2 * 2  # of half the ranks
    assert 2 * rank - alone == 16 * 2 * (2 * (4 + 2) * 2 + copied_key_and_value)


def test_context_ranks_gather_keys_and_values() -> None:
    gathered = _activations({}, {}, context_parallel_size=2)
    own = _activations({}, {}, context_parallel_size=2, device="cuda")
    assert gathered - own == 2 * 16 * 2 * 8
    assert own == _activations({}, {}) // 2


def test_uneven_stages_have_the_given_layers() -> None:
    model = {"num_layers": 4}
    chosen = settings(
        model, {}, pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=3
    )
    even = settings(model, {}, pipeline_model_parallel_size=2)
    first, last = (memory_per_rank(chosen, 16, 2, stage).activations for stage in (0, 1))
    alike = memory_per_rank(even, 16, 2, 1).activations
    assert (first, last) == (2 * 3 * alike // 2, alike // 2)  # two micro-batches in flight
    assert "stage layers  3, 1" in render(chosen, 16, 2, 0)


def test_the_combined_schedule_has_one_more_chunk_in_flight() -> None:
    """Two stages of two virtual ones: half of a stage's layers."""
    layout = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    plain = settings({"num_layers": 4}, {}, **layout)
    chosen = plain.performance.model_copy(update={"overlap_moe_expert_parallel_comm": True})
    overlapped = plain.model_copy(update={"performance": chosen})
    more, less = (memory_per_rank(each, 16, 2, 1).activations for each in (overlapped, plain))
    # Of the last stage 1 micro-batch, and (2 - 1) / (2 x 2) of it for the interleaving.
    assert more == less * (1.25 + 0.5) / 1.25


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100L NVL", None),
        ("NVIDIA L40S", 362.0),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops_per_s(name) == peak


def test_the_plan_of_olmoe() -> None:
    olmoe = Settings.model_validate(recipe.read(OLMOE))
    text = render(olmoe, 50280, 256, 17)
    for part in (
        "6,919,161,856", "1,282,017,280", "padded to 50,304", "expert         8 (rank 17 is 1)",
        "5,033,164,800,000", "token 10,485,760,000", "1,024 samples, 4,194,304 tokens",
    ):  # fmt: skip
        assert part in text
    flops = flops_per_token(olmoe, 50280)
    assert math.isclose(flops, 6 * 1.1789e9 + 6 * 16 * 4096 * 2048, rel_tol=1e-3)


def test_the_plan_of_a_wsd_run() -> None:
    plain = settings({}, {})
    rate = {"lr": 1e-3, "lr_decay_style": "WSD", "lr_warmup_iters": 10, "lr_wsd_decay_iters": 20}
    tree = {**plain.model_dump(), "learning_rate": rate}
    tree["training"]["train_iters"] = 100
    lines = [line.split() for line in render(Settings.model_validate(tree), 16, 1, 0).splitlines()]
    points = [line for line in lines if line[0] == "step"]
    assert points == [
        ["step", "0", "0"], ["step", "10", "0.001"], ["step", "80", "0.001"], ["step", "100", "0"],
    ]  # fmt: skip
