"""Parameters built by every rank equal the plan, in every kind of layout."""

from typing import Any

import pytest
import torch

from moetron.common.errors import RunError
from moetron.moe.config.checks import problems
from moetron.moe.config.schema.settings import Settings, fields
from moetron.moe.layers import specs
from moetron.moe.layers.build_model import count_built
from moetron.moe.layers.experts import GroupedExperts
from moetron.moe.plan.parameters import RankParameters, count_parameters, per_chunk, per_rank
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.runtime import divide
from tests.parallel.support.harness import run_each, run_ranks

VOCABULARY = 100
HOME = {name: group for group, name, _ in fields()}
BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "seq_length": 16,
    "vocab_size": VOCABULARY,
    "num_experts": 4,
    "moe_ffn_hidden_size": 32,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_pre_softmax": True,
    "train_iters": 1,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "lr": 1e-3,
    "mock_data": True,
}
PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
OPENMOE = {"ffn_type": "double_gated", "moe_sequential_ffn_hidden_size": 16}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {**TP2, "moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True},
    "tp-etp1": {**TP2, "expert_tensor_parallel_size": 1, "moe_router_type": "noisy_topk"},
    "ep": {"expert_model_parallel_size": 2, "moe_expert_multiplicative_bias": True},
    "pp-uneven": {**PP2, "pipeline_model_parallel_layout": "Et|t*3L"},
    "pp-interleaved": {**PP2, "num_layers_per_virtual_pipeline_stage": 1},
    "pp-mtp": {**PP2, "mtp_num_layers": 1},
    "pp-tied": {**PP2, "untie_embeddings_and_output_weights": False},
    "openmoe-ep": {**OPENMOE, "expert_model_parallel_size": 2},
    "openmoe-pp": {**OPENMOE, **PP2},
    "latent-tp": {"multi_latent_attention": True, "num_query_groups": None, **TP2},
}


def _settings(changes: dict[str, Any]) -> Settings:
    tree: dict[str, dict[str, Any]] = {group: {} for group in Settings.model_fields}
    for name, value in {**BASE, **changes}.items():
        tree[HOME[name]][name] = value
    chosen = Settings.model_validate(tree)
    assert not problems(chosen, 2, device="cpu", te=False)
    return chosen


def _build(changes: dict[str, Any]) -> tuple[int, int, int]:
    """Return (pipeline stage, dense, expert) of this rank; the build compares with the plan."""
    settings = _settings(changes)
    runtime = divide(settings, torch.device("cpu"))
    built = count_built(build_trainer(settings, runtime, VOCABULARY).chunks)
    return runtime.groups.pp.rank(), built.dense, built.expert


@pytest.mark.timeout(600)
def test_built_parameters_equal_the_plan() -> None:
    results = run_each(_build, 2, [(changes,) for changes in LAYOUTS.values()])
    for (name, changes), ranks in zip(LAYOUTS.items(), results, strict=True):
        settings = _settings(changes)
        for stage, dense, expert in ranks:
            assert RankParameters(dense, expert) == per_rank(settings, VOCABULARY, stage), name


def test_chunks_add_up_to_the_rank() -> None:
    settings = _settings(LAYOUTS["pp-interleaved"])
    remaining = count_parameters(settings, VOCABULARY).total
    for stage in range(2):
        chunks = [per_chunk(settings, VOCABULARY, stage, chunk) for chunk in range(2)]
        rank = per_rank(settings, VOCABULARY, stage)
        assert sum(chunk.dense for chunk in chunks) == rank.dense
        assert sum(chunk.expert for chunk in chunks) == rank.expert
        remaining -= rank.dense + rank.expert
    assert remaining == 0


def _build_wrong(changes: dict[str, Any]) -> str:
    """Return each rank's error for a layer spec without the third matrix of experts."""
    specs.VariantExperts = GroupedExperts
    try:
        _build(changes)
    except RunError as error:
        return str(error)
    return "built"


def test_each_rank_rejects_a_wrong_model() -> None:
    changes = {**PP2, "ffn_type": "double_gated", "moe_layer_freq": [0, 1, 1, 1]}
    for stage, error in enumerate(run_ranks(_build_wrong, 2, changes)):
        planned = per_rank(_settings(changes), VOCABULARY, stage).expert
        missing = (1 + stage) * 4 * 32 * 32  # a matrix of each expert
        assert f"stage {stage} has" in error and f"{planned - missing:,} of experts" in error
