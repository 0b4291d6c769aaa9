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
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2700)]


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2600,
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


@pytest.fixture(scope="module")
def olmoes_life(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return the folder and the printed lines of life.sh."""
    folder = tmp_path_factory.mktemp("life")
    return folder, run("bash", "examples/olmoe_1b_7b/life.sh", str(folder)).splitlines()


def test_olmoes_life_ends_at_zero_and_its_export_has_its_loss(
    olmoes_life: tuple[Path, list[str]],
) -> None:
    tmp_path, output = olmoes_life
    assert "equal" in output
    metrics, folder = rows(tmp_path / "run" / "metrics.jsonl"), tmp_path / "run"
    anneal = [row["lr"] for row in metrics if row["stage"] == 2]
    assert anneal == sorted(anneal, reverse=True) and anneal[-1] < anneal[0] / 50
    losses = [row["validation_loss"] for row in rows(folder / "validation.jsonl")]
    assert losses[-1] < losses[-2] < losses[0]


def test_olmoes_life_goes_through_fine_tuning_and_preferences_to_a_chat(
    olmoes_life: tuple[Path, list[str]],
) -> None:
    folder, output = olmoes_life
    stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    assert list(stages) == ["pretrained", "SFT", "DPO"]
    assert stages["SFT"]["answer_loss"] < stages["pretrained"]["answer_loss"] - 1
    assert stages["DPO"]["accuracy"] > 0.8
    assert stages["pretrained"]["stops"] < 0.5
    assert min(stages[name]["in_template"] for name in ("SFT", "DPO")) > 0.8
    # The same values by another path: the evaluations of the runs.
    answers = rows(folder / "sft" / "validation.jsonl")
    assert answers[0]["step"] == 0
    for name, row in (("pretrained", answers[0]), ("SFT", answers[-1])):
        assert stages[name]["answer_loss"] == pytest.approx(row["validation_loss"], abs=1e-3)
    pairs = rows(folder / "dpo" / "validation.jsonl")
    assert pairs[0]["preference_loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert stages["DPO"]["accuracy"] == pytest.approx(pairs[-1]["accuracy"], abs=0.01)
    assert (folder / "dpo_hf" / "chat_template.jinja").is_file()
    questions = [number for number, line in enumerate(output) if line.startswith("> W")]
    assert len(questions) == 2 and all(output[number + 1].strip() for number in questions)
