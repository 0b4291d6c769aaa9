"""Training of every tiny recipe, and the life.sh scripts of OpenMoE and OLMoE. Takes minutes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TINY = sorted(ROOT.glob("examples/*/tiny.yaml"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("recipe", TINY, ids=lambda path: path.parent.name)
def test_a_tiny_recipe_learns(recipe: Path, tmp_path: Path) -> None:
    flags = ("--exit-interval", "12", "--no-tensorboard", "--cpu-threads", "1")
    command = (sys.executable, "pretrain_moe.py", "--config", str(recipe), *flags)
    run(*command, "--save", str(tmp_path))
    losses = [row["lm_loss"] for row in rows(tmp_path / "metrics.jsonl")]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05


def test_openmoes_life_and_its_report(tmp_path: Path) -> None:
    run("bash", "examples/openmoe_8b/life.sh", str(tmp_path))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    stage = r"<td[^>]*>(ul2|causal); code ([0-9.]+)\s%, prose ([0-9.]+)\s%</td>"
    shares = re.findall(stage, page)
    assert [name for name, *_ in shares] == ["ul2", "causal"]
    assert [float(code) for _, code, _ in shares] == pytest.approx([52.25, 15], abs=3)
    drops = re.findall(
        r"<td[^>]*>([0-9.]+)\s% of choices in the first part .*? ([0-9.]+)\s% in", page
    )
    assert len(drops) == 2 and all(float(last) > 2 * float(first) for first, last in drops)
    stages = [row["stage"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert stages == sorted(stages) and set(stages) == {1, 2}


def test_olmoes_life_ends_at_zero_and_its_export_has_its_loss(tmp_path: Path) -> None:
    output = run("bash", "examples/olmoe_1b_7b/life.sh", str(tmp_path))
    assert output.splitlines()[-1] == "equal"
    metrics, folder = rows(tmp_path / "run" / "metrics.jsonl"), tmp_path / "run"
    anneal = [row["lr"] for row in metrics if row["stage"] == 2]
    assert anneal == sorted(anneal, reverse=True) and anneal[-1] < anneal[0] / 50
    losses = [row["validation_loss"] for row in rows(folder / "validation.jsonl")]
    assert losses[-1] < losses[-2] < losses[0]
