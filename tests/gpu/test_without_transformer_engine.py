"""A GPU on which Transformer Engine does not import: our layers train, and the reason is logged.

A fake package that raises OSError precedes any installed one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.devices import needs
from tests.unit.host.stand_ins import write_transformer_engine

pytestmark = [pytest.mark.gpu, needs()]
ROOT = Path(__file__).parents[2]
RECOMPUTED = ("--recompute-granularity", "selective", "--recompute-modules", "layernorm")


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("olmoe_1b_7b", ()),
        ("olmoe_1b_7b", RECOMPUTED),
        ("openmoe_8b", ()),
        ("deepseek_v2_lite", ("--lr-wsd-decay-iters", "1")),
    ],
    ids=["olmoe", "recomputed-norms", "openmoe", "latent-attention"],
)
def test_trains(tmp_path: Path, recipe: str, flags: tuple[str, ...]) -> None:
    write_transformer_engine(tmp_path, "OSError")
    config = str(ROOT / "examples" / recipe / "tiny.yaml")
    argv = ["pretrain_moe.py", "--config", config, "--mock-data", "--train-iters", "2"]
    argv += ["--lr-warmup-iters", "1", "--eval-iters", "0", *flags]
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "local layers, without Transformer Engine: its import fails: OSError" in done.stderr
