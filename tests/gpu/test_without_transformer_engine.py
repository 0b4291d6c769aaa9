"""A GPU on which Transformer Engine does not import: our layers train, and the reason is logged.

A fake package that raises OSError precedes any installed one, in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetron.moe.host.usable import transformer_engine_fault
from tests.gpu.devices import needs
from tests.gpu.gpu_cases import OLMOE, ROOT
from tests.gpu.in_process import pretrain
from tests.unit.host.stand_ins import write_transformer_engine

RECIPES: dict[str, tuple[str, ...]] = {
    "olmoe_1b_7b": ("--recompute-granularity", "selective", "--recompute-modules", "layernorm"),
    "openmoe_8b": (),
    "deepseek_v2_lite": ("--lr-wsd-decay-iters", "1"),
}
COMMON = ("--mock-data", "--train-iters", "2", "--lr-warmup-iters", "1", "--eval-iters", "0")


def train_all() -> None:
    """Train every recipe in this process."""
    for recipe, flags in RECIPES.items():
        config = str(ROOT / "examples" / recipe / "tiny.yaml")
        pretrain(["--config", config, *COMMON, *flags])
    print(f"trained without: {transformer_engine_fault()}")


@pytest.mark.gpu
def test_our_layers_train(tmp_path: Path) -> None:
    """In one process the helpers of this folder, as they are in the others of these tests."""
    found = _in_its_own_process(tmp_path, "-m", "tests.gpu.test_without_transformer_engine")
    assert "trained without: " in found.stdout


@pytest.mark.gpu
@needs()
def test_the_reason_is_logged(tmp_path: Path) -> None:
    found = _in_its_own_process(tmp_path, "pretrain_moe.py", *OLMOE, *COMMON)
    reason = "local layers, without Transformer Engine: its import fails: OSError"
    assert reason in found.stderr


def _in_its_own_process(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    write_transformer_engine(folder, "OSError")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


if __name__ == "__main__":
    train_all()
