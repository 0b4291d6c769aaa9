"""Transformer Engine's layers against our own on one GPU: forward, backward, bf16 and FP8.

Both start from one checkpoint. bf16 rounds to 2^-9 and E4M3 to 2^-4 of a value; a wrong layout of
gate and up, a norm in the wrong place or a missing term changes a gradient by its own size.
"""

from pathlib import Path
from typing import Any

import pytest

from moetron.moe.verify.parity import Difference, Result, Tolerance, compare
from tests.gpu.devices import needs, needs_package
from tests.gpu.test_layouts import BF16
from tests.parallel.support.parity_cases import settings
from tests.parallel.support.parity_ranks import Run, results_of

pytestmark = [pytest.mark.gpu, needs_package("transformer-engine", "transformer_engine")]

OURS = {**BF16, "transformer_impl": "local"}
THEIRS = {**BF16, "transformer_impl": "transformer_engine"}


def _difference(folder: Path, **changes: Any) -> Difference:
    """Compare Transformer Engine's first step with ``changes`` to that of our layers in bf16."""
    weights = str(folder / "weights")

    def step(write: bool, values: dict[str, Any]) -> Result:
        run = Run(settings("dp1", 2, "cuda", **values), weights, write)
        ((_, result, _),) = results_of({"one": run}, 1, 1, "cuda")
        return result

    return compare(step(True, OURS), step(False, {**THEIRS, **changes}))


@needs()
@pytest.mark.parametrize("grouped", [True, False])
def test_bf16(tmp_path: Path, grouped: bool) -> None:
    found = _difference(tmp_path, moe_grouped_gemm=grouped)
    assert found.within(Tolerance(loss=5e-3, grad_norm=2e-2, gradient=0.1)), found


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("delayed", marks=needs(1, (8, 9))),
        pytest.param("tensorwise", marks=needs(1, (8, 9))),
        pytest.param("blockwise", marks=needs(1, (9, 0))),
        pytest.param("mxfp8", marks=needs(1, (10, 0))),
    ],
)
def test_fp8(tmp_path: Path, recipe: str) -> None:
    found = _difference(tmp_path, fp8_format="hybrid", fp8_recipe=recipe)
    assert found.within(Tolerance(loss=2e-2, grad_norm=0.1, gradient=0.5)), found


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("delayed", marks=needs(1, (8, 9))),
        pytest.param("tensorwise", marks=needs(1, (8, 9))),
        pytest.param("blockwise", marks=needs(1, (9, 0))),
    ],
)
def test_parameters_in_fp8(tmp_path: Path, recipe: str) -> None:
    found = _difference(
        tmp_path,
        fp8_format="hybrid",
        fp8_recipe=recipe,
        fp8_param_gather=True,
        use_distributed_optimizer=True,
    )
    assert found.within(Tolerance(loss=2e-2, grad_norm=0.1, gradient=0.5)), found
