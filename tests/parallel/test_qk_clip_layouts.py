"""QK-clip in several layouts against one process, and of main parameters."""

from pathlib import Path
from typing import Any

import pytest

from moetron.moe.checkpoint.optimizer_state import leaves, mains
from moetron.moe.optim.qk_clip import AttentionLogits
from tests.parallel.support.checkpoint_runs import (
    LAYOUTS,
    metrics,
    parallel_of,
    run,
    settings,
    start,
)
from tests.parallel.support.harness import run_ranks
from tests.parallel.support.parity_suite import Suite

CLIPPED = {"qk_clip": True, "qk_clip_threshold": 0.5}
LATENT = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "kv_lora_rank": 16,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 4,
}


@pytest.mark.parametrize(
    ("changes", "layouts"),
    [
        ({"add_qkv_bias": True}, ["dp2zero1", "tp2", "pp2vpp2", "cp2ep2"]),
        (LATENT, ["tp2"]),
    ],
)
def test_two_ranks_equal_one(tmp_path: Path, changes: dict[str, Any], layouts: list[str]) -> None:
    """Losses, norms and largest logits of four steps, all but the first after a clip."""
    whole = {"qk_layernorm": False, "qk_layernorm_scope": "head", **CLIPPED, **changes}
    suite = Suite(tmp_path, 4, changes=whole)
    assert not suite.differences("dropless", layouts)
    for _, rows in suite._known.values():
        assert max(row["max_attention_logit"] for row in rows) > CLIPPED["qk_clip_threshold"]


def _clip_once(folder: str, layout: str) -> float:
    """Return the largest relative distance of bf16 weights from their fp32 main parameters."""
    chosen = settings(
        layout,
        attention={**CLIPPED, "log_max_attention_logit": True},
        model={"init_method_std": 0.5},
        precision={"bf16": True},
        training={"train_iters": 2},
        learning_rate={"lr": 1e-4, "lr_warmup_iters": 0},
        checkpoint={"save": folder},
    )
    with parallel_of(chosen):
        loop = start(chosen)
        factors: list[float] = []
        plain = AttentionLogits.factors

        def noted(self: AttentionLogits) -> Any:
            found = plain(self)
            factors.extend(float(rows.min()) for rows in found.values())
            return found

        AttentionLogits.factors = noted  # type: ignore[method-assign]
        try:
            loop.run(lambda: False)
        finally:
            AttentionLogits.factors = plain  # type: ignore[method-assign]
        assert min(factors) < 0.9
        furthest = 0.0
        for leaf in leaves(loop.trainer.optimizer):
            for parameter, main, span in mains(leaf):
                held = parameter.detach().float().flatten()
                part = held if span is None else held[span.start : span.end]
                apart = (part - main.flatten()).abs() / main.flatten().abs().clamp(min=1e-6)
                furthest = max(furthest, float(apart.max()))
    return furthest


@pytest.mark.parametrize("layout", ["dp", "zero"])
def test_main_parameters_are_clipped_too(tmp_path: Path, layout: str) -> None:
    """Weights and main parameters are scaled apart: two roundings to bf16."""
    assert max(run_ranks(_clip_once, 2, str(tmp_path), layout)) <= 2 * 2**-8
    logits = [row["max_attention_logit"] for row in metrics(tmp_path)]
    assert logits[1] < logits[0]


def _with_a_stage_for_the_loss(folder: str, split: str | None) -> None:
    chosen = settings(
        "dp",
        attention={**CLIPPED, "log_max_attention_logit": True},
        model={"init_method_std": 0.5, "hidden_dropout": 0.0},
        training={"train_iters": 2},
        parallel={}
        if split is None
        else {**LAYOUTS["pp2"], "pipeline_model_parallel_layout": split},
        checkpoint={"save": folder},
    )
    run(chosen)


def test_a_stage_without_attention_takes_part(tmp_path: Path) -> None:
    """Its rank has no logits to clip: the last stage of many balanced layouts is the loss alone."""
    rows = []
    for name, ranks, split in (("one", 1, None), ("two", 2, "Ett|L")):
        run_ranks(_with_a_stage_for_the_loss, ranks, str(tmp_path / name), split)
        rows.append([row["max_attention_logit"] for row in metrics(tmp_path / name)])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    assert min(rows[0]) > CLIPPED["qk_clip_threshold"]
