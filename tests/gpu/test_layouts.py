"""Layouts on 2 to 8 GPUs and NCCL against one GPU: the table of tests/parallel, our own layers.

    python -m pytest tests/gpu/test_layouts.py -m gpu -s

In fp32. NCCL adds in another order than gloo, and kernels add atomically: tolerances are ten times
those of the host.
"""

from pathlib import Path

import pytest

from tests.gpu.devices import kind_fault, needs, needs_package
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


@needs(2)
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_overlapped_exchange_equals_the_plain_one(tmp_path: Path, impl: str) -> None:
    """On streams that run beside each other; see tests/parallel/test_expert_overlap.py."""
    if fault := kind_fault(impl == "transformer_engine", (8, 0)):
        pytest.skip(fault)
    changes = {**BF16, "transformer_impl": impl}
    suite = Suite(tmp_path, 2, "cuda", changes, slack=1e4)
    plain = suite.differences("dropless", ["ep2"])
    for flags in ({}, {"delay_wgrad_compute": True}):
        suite.changes = {**changes, "overlap_moe_expert_parallel_comm": True, **flags}
        assert not plain and not suite.differences("dropless", ["ep2"])
