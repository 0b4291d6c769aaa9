"""Limits of the system: raised where possible, else refused in words before a rank starts."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetron.common.errors import ConfigError, RunError
from moetron.common.watch import limits
from moetron.moe.training.batches import LOST_WORKER, lost_workers

ROOT = Path(__file__).resolve().parents[2]
UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("ulimit -n 64", "ulimit -n 64: a rank of this run opens up to"),
        ("ulimit -v 1500000", "ulimit -v 1500000: a rank of this run needs about"),
    ],
)
def test_a_low_limit_is_a_mistake_of_the_user(limit: str, words: str) -> None:
    recipe = ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml"
    command = f"{sys.executable} {ROOT}/pretrain_moe.py --config {recipe} --check --world-size 2"
    done = subprocess.run(
        ["bash", "-c", f"{limit} && exec {command}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


def test_the_limit_of_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, int]] = []
    kinds = {resource.RLIMIT_NOFILE: (64, 4096), resource.RLIMIT_AS: (UNLIMITED, UNLIMITED)}
    monkeypatch.setattr(limits.resource, "getrlimit", kinds.__getitem__)
    monkeypatch.setattr(limits.resource, "setrlimit", lambda _, pair: chosen.append(pair))
    limits.require_limits(2, 2, 0, 0)
    limits.require_limits(9, 2, 1, 0)
    assert chosen == [(384 + 24, 4096), (384 + 8 * 24 + 8, 4096)]
    with pytest.raises(ConfigError, match="ulimit -n 4096: a rank of this run opens up to 24936"):
        limits.require_limits(1024, 8, 0, 0)
    with pytest.raises(ConfigError, match="ulimit -n 4096: a rank of this run opens up to 4476"):
        limits.require_limits(1024, 8, 0, 0, gpus=True)
    chosen.clear()
    limits.require_limits(512, 8, 0, 0, gpus=True)  # NCCL connects neighbours, gloo all
    assert chosen == [(4096, 4096)]


def test_memory_and_dev_shm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory: parameters, gradients .* 2 ranks take .* GiB"):
        limits.require_limits(2, 2, 0, 1 << 50)
    monkeypatch.setattr(limits, "SHARED", tmp_path)
    limits.require_limits(2, 2, 2, 0)
    monkeypatch.setattr(limits, "SHARED_A_WORKER", 1 << 60)
    with pytest.raises(ConfigError, match=r"KiB free: semaphores of loader workers need"):
        limits.require_limits(2, 2, 2, 0)
    monkeypatch.setattr(limits, "SHARED", tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"--num-workers needs .*absent: No such file"):
        limits.require_limits(2, 2, 2, 0)
    limits.require_limits(2, 2, 0, 0)


def test_a_dead_worker_is_an_error_of_the_run() -> None:
    loader = torch.utils.data.DataLoader(_Dying(), batch_size=None, num_workers=1)
    with pytest.raises(RunError, match=r"loads samples ended \(DataLoader"), lost_workers():
        next(iter(loader))
    with pytest.raises(RuntimeError, match="other"), lost_workers():
        raise RuntimeError("other")
    assert LOST_WORKER == "DataLoader worker"


class _Dying(torch.utils.data.Dataset[int]):
    def __getitem__(self, number: int) -> int:
        os.kill(os.getpid(), 9)
        return number

    def __len__(self) -> int:
        return 2
