"""Layouts on 2 to 8 GPUs and NCCL against one GPU: the table of tests/parallel, our own layers.

    python -m pytest tests/gpu/test_layouts.py -m gpu -s

In fp32. NCCL adds in another order than gloo, and kernels add atomically: tolerances are ten times
those of the host.
"""

from pathlib import Path

import pytest

from tests.gpu.devices import needs, needs_package
from tests.parallel.support.parity_cases import layouts
from tests.parallel.support.parity_suite import Suite

pytestmark = pytest.mark.gpu

STEPS = 10
EXACT = {"transformer_impl": "local"}
BF16 = {
    "bf16": True,
    "hidden_size": 256,
    "ffn_hidden_size": 256,
    "moe_ffn_hidden_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "seq_length": 128,
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["dropless", "capacity", "sequential"])
@pytest.mark.parametrize("ranks", [pytest.param(n, marks=needs(n)) for n in (2, 4, 8)])
def test_every_layout_equals_one_gpu(tmp_path: Path, mode: str, ranks: int) -> None:
    suite = Suite(tmp_path, STEPS, "cuda", EXACT, slack=10)
    assert not suite.differences(mode, layouts(ranks))


@needs_package("deep_ep", "deep_ep")
@pytest.mark.parametrize("ranks", [pytest.param(n, marks=needs(n, (9, 0))) for n in (2, 8)])
def test_deep_ep_equals_all_to_all(tmp_path: Path, ranks: int) -> None:
    """In bf16 a lost assignment or weight shows, but rounding does not."""
    suite = Suite(tmp_path, 1, "cuda", BF16, slack=1e4)
    alltoall = suite.differences("dropless", [f"ep{ranks}"])
    suite.changes = {**BF16, "moe_token_dispatcher_type": "flex"}
    assert not alltoall and not suite.differences("dropless", [f"ep{ranks}"])
