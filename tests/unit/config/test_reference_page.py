"""docs/configuration.md and all recipes in examples/ match the settings."""

from pathlib import Path

import pytest

from moetron.moe.config import recipe
from moetron.moe.config.command import load
from moetron.moe.config.reference_page import document
from moetron.moe.config.schema.derived import smallest_world_size
from moetron.moe.config.schema.parallel import ParallelSettings
from moetron.moe.plan.render import render

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("data.yaml", "life.yaml", "sft_tiny.yaml", "dpo_tiny.yaml")
"""Parts of recipes."""
RECIPES = sorted(
    path
    for path in (ROOT / "examples").rglob("*.yaml")
    if path.name not in PARTS
    and path.parent.name not in ("ablations", "evaluation")  # sweeps, tasks
)


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == document(), (
        "run: python -m moetron.moe.config.reference_page > docs/configuration.md"
    )


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe(path: Path) -> None:
    parallel = ParallelSettings.model_validate(recipe.read(path).get("parallel", {}))
    ranks = smallest_world_size(parallel)
    argv = ["--config", str(path), "--dry-run", f"--world-size={ranks}", "--device", "cuda"]
    if path.parent.name == "quickstart":  # trains its own tokenizer
        argv += ["--vocab-size", "8000"]
    command = load(argv)
    assert render(command.settings, command.settings.model.vocab_size or 0, ranks, ranks - 1)


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if path.name == "tiny.yaml"],
    ids=lambda path: path.parent.name,
)
def test_tiny_recipes_run_on_one_rank_without_data(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert load(["--config", str(path), "--device", "cpu"]).settings.data.mock_data
