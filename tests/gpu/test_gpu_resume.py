"""On the device of this machine: bits that repeat, run to run and after a resume.

The runs share one new process, whose environment --deterministic-mode may set before CUDA starts.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from moetron.moe.host.usable import cuda_fault
from tests.gpu.devices import kind_fault
from tests.gpu.gpu_cases import KINDS, OLMOE
from tests.gpu.in_process import pretrain
from tests.parallel.support.checkpoint_runs import assert_identical, metrics, tensors

pytestmark = pytest.mark.gpu

STEPS, HALF = 4, 2
ADAM_SHARDS = ("--use-distributed-optimizer",)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        yield pool


def runs(folder: Path, kind: str, flags: tuple[str, ...]) -> None:
    """Train twice, and resume in the middle."""
    common = [*OLMOE, *KINDS[kind].flags, *flags, "--mock-data", "--eval-iters", "0"]
    common += ["--train-iters", str(STEPS), "--lr-warmup-iters", "1", "--hidden-dropout", "0.1"]
    common += ["--save-interval", str(HALF), "--no-tensorboard"]
    pretrain([*common, "--save", str(folder / "straight")])
    pretrain([*common, "--save", str(folder / "again")])
    half = folder / "straight" / f"step_{HALF:07d}"
    pretrain([*common, "--load", str(half), "--save", str(folder / "resumed")])


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("local", ()),
        ("local16", ADAM_SHARDS),
        ("emulated", ()),
        ("scaled", ()),
        ("te16", ()),
        ("te16", ADAM_SHARDS),
        ("delayed", ()),
        ("tensorwise", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value).lstrip("-") or "plain",
)
def test_bits_repeat(
    tmp_path: Path, process: ProcessPoolExecutor, kind: str, flags: tuple[str, ...]
) -> None:
    if fault := kind_fault(KINDS[kind].te, KINDS[kind].capability):
        pytest.skip(fault)
    if cuda_fault() is None:
        flags = (*flags, "--deterministic-mode")
    process.submit(runs, tmp_path, kind, flags).result(timeout=120)
    straight, again, resumed = (tmp_path / name for name in ("straight", "again", "resumed"))
    assert metrics(again) == metrics(straight)
    assert metrics(resumed) == metrics(straight)[HALF:]
    last = f"step_{STEPS:07d}"
    assert_identical(tensors(straight / last), tensors(again / last))
    assert_identical(tensors(straight / last), tensors(resumed / last))
