"""On the device of this machine: checkpoints of another device and precision, and saved late."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetron.moe.checkpoint.tensor_writer import Contents
from tests.gpu.devices import kind_fault
from tests.gpu.gpu_cases import KINDS, OLMOE, ROOT
from tests.gpu.in_process import pretrain
from tests.parallel.support.checkpoint_runs import metrics

pytestmark = pytest.mark.gpu

COMMON = (*OLMOE, "--mock-data", "--eval-iters", "0", "--lr-warmup-iters", "1", "--no-tensorboard")
LOSSES = ("lm_loss", "grad_norm")


def _argv(kind: str, steps: int, *more: str) -> list[str]:
    """Return flags of a run; the schedule does not depend on its length."""
    schedule = ("--train-iters", str(steps), "--lr-decay-iters", "6", "--save-interval", "2")
    return [*COMMON, *KINDS[kind].flags, *schedule, *more]


def _skip_without(*kinds: str) -> None:
    for kind in kinds:
        if fault := kind_fault(KINDS[kind].te, KINDS[kind].capability):
            pytest.skip(fault)


@pytest.fixture(scope="module")
def from_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of four steps on the CPU in another process, under way during the other tests."""
    folder = tmp_path_factory.mktemp("cpu")
    argv = [*_argv("local", 4), "--save", str(folder)]
    hidden = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain_moe.py"), *argv],
        cwd=ROOT,
        env={**os.environ, **hidden},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield folder
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("emulated", "local16"),
        ("scaled", "local16"),
        ("scaled_experts", "te16"),
        ("delayed", "te16"),
        ("tensorwise", "te16"),
        ("blockwise", "te16"),
        ("delayed", "local16"),
        ("delayed_params", "te16"),
        ("tensorwise_params", "te16"),
        ("blockwise_params", "te16"),
    ],
)
def test_fp8_there_and_back(tmp_path: Path, from_cpu: Path, kind: str, other: str) -> None:
    """Two steps in FP8, two in bf16, two in FP8: the losses of six in FP8."""
    _skip_without(kind, other)
    pretrain(_argv(kind, 6, "--save", str(tmp_path / "straight")))
    source = str(tmp_path / "straight" / "step_0000002")
    for number, (used, steps) in enumerate([(other, 4), (kind, 6)]):
        folder = str(tmp_path / str(number))
        pretrain(_argv(used, steps, "--load", source, "--save", folder))
        source = folder
    straight = metrics(tmp_path / "straight")[2:]
    changed = [*metrics(tmp_path / "0"), *metrics(tmp_path / "1")]
    assert [row["step"] for row in changed] == [3, 4, 5, 6]
    for ours, theirs in zip(changed, straight, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-2)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.2)


@pytest.mark.parametrize("kind", ["local16", "te16", "delayed"])
def test_a_background_save_holds_the_weights_of_its_step(
    tmp_path: Path, from_cpu: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training continues during the write; then the file holds what a blocking save does."""
    _skip_without(kind)
    write = Contents.write

    def late(*args: object) -> dict[str, str]:
        time.sleep(1)  # several steps
        return write(*args)

    monkeypatch.setattr(Contents, "write", late)
    pretrain(_argv(kind, 6, "--save", str(tmp_path / "late"), "--async-save"))
    monkeypatch.undo()
    source = str(tmp_path / "late" / "step_0000002")
    pretrain(_argv(kind, 4, "--load", source, "--save", str(tmp_path / "resumed")))
    straight, resumed = metrics(tmp_path / "late"), metrics(tmp_path / "resumed")
    for ours, theirs in zip(resumed, straight[2:4], strict=True):
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def test_a_cpu_checkpoint_resumes_here_without_flags(tmp_path: Path, from_cpu: Path) -> None:
    """Steps 3 and 4 from the CPU's step 2, with its optimizer state."""
    limit = time.monotonic() + 120
    while not (from_cpu / "step_0000004").exists():
        assert time.monotonic() < limit, "the run on the CPU takes too long"
        time.sleep(0.2)
    source = str(from_cpu / "step_0000002")
    pretrain(_argv("local", 4, "--load", source, "--save", str(tmp_path)))
    for ours, theirs in zip(metrics(tmp_path), metrics(from_cpu)[2:], strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
