"""The combined 1F1B schedule, which interleaves micro-batches, changes no bit.

With ``--overlap-moe-expert-parallel-comm``, ``--delay-wgrad-compute`` and
``--ep-overlap-early-attn-memory-release``, on streams that run at once: their order is tested, not
that anything overlaps.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from moetron.moe.config.command import load
from tests.parallel.support.parity_ranks import Run, results_of
from tests.parallel.support.steps import Case, run_all

TP, EP, PP = (f"{kind}_model_parallel_size" for kind in ("tensor", "expert", "pipeline"))
ETP, VIRTUAL = "expert_tensor_parallel_size", "num_layers_per_virtual_pipeline_stage"
OVERLAP = {"overlap_moe_expert_parallel_comm": True}
EARLY = {**OVERLAP, "ep_overlap_early_attn_memory_release": True}
DELAY = {**OVERLAP, "delay_wgrad_compute": True}
SHARED = {"moe_shared_expert_intermediate_size": 16}
RECOMPUTED = {
    "recompute_granularity": "selective",
    "recompute_modules": ["layernorm", "core_attn", "mlp", "shared_experts"],
}
LATENT = {
    "attention": {
        "multi_latent_attention": True, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4, "v_head_dim": 8,
    },
    "model": {"qk_layernorm_scope": "head", "num_query_groups": None},
}  # fmt: skip
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "layout", "more"),
    [
        pytest.param(2, {EP: 2, **RECOMPUTED}, {"moe": SHARED}, id="EP2, recomputed"),
        pytest.param(2, {TP: 2, EP: 2, ETP: 1}, {"moe": SHARED}, id="TP2 EP2"),
        pytest.param(4, {PP: 2, EP: 2, VIRTUAL: 1, "overlap_grad_reduce": True}, {}, id="PP2 EP2"),
        pytest.param(4, {TP: 2, EP: 2, ETP: 2}, {}, id="ETP2 EP2", marks=slow),
        pytest.param(2, {TP: 2, EP: 2, ETP: 1}, LATENT, id="latent attention", marks=slow),
        pytest.param(2, {EP: 2}, {"moe": {"moe_grouped_gemm": False}}, id="sequential", marks=slow),
        pytest.param(
            2,
            {EP: 2},
            {
                "moe": {
                    "moe_expert_capacity_factor": 0.75,
                    "moe_pad_expert_input_to_capacity": True,
                },
                "attention": {"add_qkv_bias": True},
            },
            id="padded to capacity",
            marks=slow,
        ),
        pytest.param(
            2,
            {EP: 2},
            {"moe": {"moe_router_type": "reinforce", "moe_router_pre_softmax": False}},
            id="REINFORCE",
            marks=slow,
        ),
    ],
)
def test_losses_and_gradients_are_the_same_bits(
    ranks: int, layout: dict[str, Any], more: dict[str, Any]
) -> None:
    ways = ({}, OVERLAP, DELAY, EARLY)
    cases = [Case(layout, performance=way, bf16=True, **more) for way in ways]
    plain, *overlapped = run_all(ranks, cases)
    for result, way in zip(overlapped, ways[1:], strict=True):
        for name in ("loss", "auxiliary"):
            assert result[name] == plain[name], way
        for name in ("chosen", "kept"):
            assert torch.equal(result[name], plain[name]), way
        for name, gradient in plain["gradients"].items():
            assert gradient.abs().max() > 0, name
            assert torch.equal(result["gradients"][name], gradient), (way, name)


RECIPE = Path(__file__).parents[2] / "examples" / "olmoe_1b_7b" / "tiny.yaml"
LAYOUT = {
    EP: 2,
    "overlap_grad_reduce": True,
    "use_distributed_optimizer": True,
    "overlap_param_gather": True,
    "ddp_bucket_size": 20000,
}


@pytest.mark.parametrize(
    ("precision", "way"),
    [({}, DELAY), pytest.param({"fp8_format": "hybrid"}, OVERLAP, marks=slow, id="FP8")],
)
def test_training_runs_the_same(
    tmp_path: Path, precision: dict[str, Any], way: dict[str, bool]
) -> None:
    """Three steps of a recipe: losses, norms, routing losses and the optimizer's moments."""
    settings = load(
        ["--config", str(RECIPE), "--seq-length", "32", "--num-layers", "2", "--bf16"]
    ).settings
    plain = settings.model_copy(
        update={
            "parallel": settings.parallel.model_copy(update=LAYOUT),
            "precision": settings.precision.model_copy(update=precision),
        }
    )
    chosen = settings.performance.model_copy(update=way)
    runs = {
        "plain": Run(plain, str(tmp_path), write=True),
        "overlapped": Run(plain.model_copy(update={"performance": chosen}), str(tmp_path)),
    }
    (_, expected, rows), (_, overlapped, found) = results_of(runs, 2, steps=3)
    assert found == rows
    for name, moment in expected.gradients.items():
        assert torch.equal(overlapped.gradients[name], moment), name
