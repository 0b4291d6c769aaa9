"""Layers of each precision against our own in bf16 on one GPU: forward, backward, first update.

All start from one checkpoint. bf16 rounds to 2^-9 and E4M3 to 2^-4 of a value; a wrong layout of
gate and up, a norm in the wrong place or a missing term changes a gradient by its own size.
"""

from pathlib import Path
from typing import Any

import pytest

from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import save_checkpoint
from moetron.moe.training.trainer import Trainer
from moetron.moe.verify.parity import Difference, Result, Tolerance, compare
from tests.gpu.devices import device, kind_fault
from tests.gpu.in_process import train
from tests.gpu.test_layouts import BF16
from tests.parallel.support.parity_cases import settings
from tests.parallel.support.sharded import assemble, local_moments

pytestmark = pytest.mark.gpu

OURS = {**BF16, "transformer_impl": "local"}
THEIRS = {**BF16, "transformer_impl": "transformer_engine"}
FP8 = Tolerance(loss=2e-2, grad_norm=0.1, gradient=0.5)
IN_FP8 = {"fp8_param_gather": True, "use_distributed_optimizer": True}


def _result(weights: Path, samples: str, **values: Any) -> Result:
    """Return the first step's loss, gradient norm and first moments from the checkpoint."""
    gradients: list[dict[str, Any]] = []
    rows = train(
        settings("dp1", 2, device().type, **values),
        steps=1,
        samples=samples,
        weights=weights,
        after=lambda trainer: gradients.extend(local_moments(trainer)),
    )
    losses, norms = ([row[key] for row in rows] for key in ("lm_loss", "grad_norm"))
    return Result(losses, norms, assemble([gradients]))


def _difference(folder: Path, common: dict[str, Any], changes: dict[str, Any]) -> Difference:
    """Compare a step with ``changes`` to that of our layers in bf16, both with ``common``."""
    samples = "prefixes" if common.get("bidirectional_prefix") else "mock"

    def save(trainer: Trainer) -> None:
        parts = trainer.chunks, trainer.optimizer, trainer.settings
        save_checkpoint(folder, Progress(), *parts, {})

    train(settings("dp1", 2, device().type, **OURS, **common), steps=0, after=save)
    ours = _result(folder, samples, **OURS, **common)
    return compare(ours, _result(folder, samples, **{**common, **changes}))


def _skip_without(capability: tuple[int, int], te: bool = True) -> None:
    if fault := kind_fault(te, capability):
        pytest.skip(fault)


@pytest.mark.parametrize(
    "common",
    [{}, {"moe_grouped_gemm": False}, {"bidirectional_prefix": True}],
    ids=["grouped", "sequential", "prefix"],
)
def test_bf16(tmp_path: Path, common: dict[str, Any]) -> None:
    _skip_without((8, 0))
    found = _difference(tmp_path, common, THEIRS)
    assert found.within(Tolerance(loss=5e-3, grad_norm=2e-2, gradient=0.1)), found


@pytest.mark.parametrize("parameters", [{}, IN_FP8], ids=["", "parameters"])
@pytest.mark.parametrize(
    ("recipe", "capability"),
    [("delayed", (8, 9)), ("tensorwise", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))],
)
def test_fp8(
    tmp_path: Path, recipe: str, capability: tuple[int, int], parameters: dict[str, Any]
) -> None:
    if recipe == "mxfp8" and parameters:
        pytest.skip("--fp8-param-gather has no mxfp8")
    _skip_without(capability)
    chosen = {"fp8_format": "hybrid", "fp8_recipe": recipe, **parameters}
    found = _difference(tmp_path, {}, {**THEIRS, **chosen})
    assert found.within(FP8), found


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_emulated_fp8(tmp_path: Path, recipe: str) -> None:
    _skip_without((8, 0), te=False)
    chosen = {"fp8_format": "hybrid", "fp8_recipe": recipe}
    found = _difference(tmp_path, {}, {**OURS, **chosen})
    assert found.within(FP8), found
