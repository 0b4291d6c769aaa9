"""Every layout against one process, from one checkpoint: losses, gradient norms, all gradients.

Ten steps (half of them in the default run) of Adam with warm-up, weight decay, clipping, balance
and z losses, a shared expert, grouped GEMM and uneven loss masks, fp32. Layouts of one size use
the same processes.
"""

from pathlib import Path

import pytest

from tests.parallel.support.parity_cases import MODES, QUICK, layouts
from tests.parallel.support.parity_suite import Suite

STEPS = 10


@pytest.mark.parametrize("mode", QUICK)
def test_two_ranks_equal_one(tmp_path: Path, mode: str) -> None:
    assert not Suite(tmp_path, STEPS // 2).differences(mode, QUICK[mode])


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(tmp_path_factory.mktemp("weights"), STEPS)


@pytest.mark.parallel_full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_every_layout_equals_one_process(suite: Suite, mode: str, ranks: int) -> None:
    """Print the table of `bash tests/run.sh --parallel-full`."""
    assert not suite.differences(mode, layouts(ranks))
