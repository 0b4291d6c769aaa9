"""Starts that would train another model than requested, or on another device, are refused."""

import os
import subprocess
import sys
from pathlib import Path

from tests.unit.host.stand_ins import was_executed, write_transformer_engine

ROOT = Path(__file__).parents[2]
TINY = ("--mock-data", "--train-iters", "2", "--lr-warmup-iters", "1", "--eval-iters", "0")


def _run(program: list[str], recipe: str, *flags: str, **environment: str) -> tuple[int, str]:
    config = ROOT / "examples" / recipe / "tiny.yaml"
    done = subprocess.run(
        [sys.executable, *program, "--config", str(config), *TINY, *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_model_that_differs_from_the_plan_ends_the_run(tmp_path: Path) -> None:
    sabotaged = tmp_path / "sabotaged.py"
    sabotaged.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import pretrain_moe\n"
        "from moetron.moe.layers import specs\n"
        "from moetron.common.process import run_guarded\n"
        "specs.SequentialFfnLayer = specs.TransformerLayer\n"
        "local = specs._local_layer\n"
        "specs._local_layer = lambda *args: local(*args[:3], None)\n"
        "sys.exit(run_guarded(pretrain_moe.main))\n"
    )
    code, message = _run([str(sabotaged)], "openmoe_8b")
    assert code == 1
    assert "the model built is not the one that the settings describe" in message
    assert "Traceback" not in message


def test_transformer_engine_is_refused_for_a_model_that_it_cannot_express() -> None:
    code, message = _run(
        ["pretrain_moe.py"], "openmoe_8b", "--transformer-impl", "transformer_engine"
    )
    assert code == 2
    assert "--ffn-type double_gated needs --transformer-impl local" in message


def test_a_broken_transformer_engine_is_ignored_without_visible_gpus(tmp_path: Path) -> None:
    write_transformer_engine(tmp_path, "RuntimeError")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code, message = _run(
        ["pretrain_moe.py"],
        "olmoe_1b_7b",
        "--transformer-impl",
        "local",
        PYTHONPATH=path,
        CUDA_VISIBLE_DEVICES="",
    )
    assert code == 0, message
    assert not was_executed(tmp_path)
