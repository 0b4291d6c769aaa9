"""The JSON schema of recipes: every recipe fits it, mistakes do not, and each recipe names it.

test_generated_pages.py compares the file with the settings.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from moetron.moe.config import recipe
from moetron.moe.config.schema.settings import Settings, fields

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = ROOT / "examples" / "recipe.schema.json"
RECIPES = sorted(
    path
    for path in (ROOT / "examples").rglob("*.yaml")
    if path.parent.name not in ("ablations", "evaluation")  # sweeps, tasks
)
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)
    assert len(RECIPES) > 30


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipe_fits_and_names_it(path: Path) -> None:
    assert not [error.message for error in VALIDATOR.iter_errors(recipe.read(path))]
    first = path.read_text(encoding="utf-8").splitlines()[0]
    name = first.removeprefix("# yaml-language-server: $schema=")
    assert name != first
    assert (path.parent / name).resolve() == SCHEMA


def test_all_settings_are_documented_in_it() -> None:
    groups = VALIDATOR.schema["properties"]
    assert set(groups) == set(Settings.model_fields)
    for group, name, _ in fields():
        definition = VALIDATOR.schema["$defs"][groups[group]["$ref"].rsplit("/", 1)[1]]
        assert definition["properties"][name]["description"]


def test_a_written_out_run_fits() -> None:
    """``settings.yaml`` of a checkpoint is a recipe again."""
    settings = Settings.model_validate(recipe.read(ROOT / "examples/openmoe_8b/pretrain.yaml"))
    assert not list(VALIDATOR.iter_errors(recipe.loads(recipe.dump(settings))))


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"num_layer": 2}},
        {"models": {}},
        {"model": {"num_layers": 0}},
        {"moe": {"num_experts": "many"}},
        {"moe": {"moe_router_type": "top"}},
        {"data": {"stages": [{"until_tokens": 3}]}},
        {"data": {"stages": [{"data_path": ["a"], "learning_rate": {"min_lr": 1}}]}},
        {"training": {"rampup_batch_size": [1, 2]}},
    ],
    ids=str,
)
def test_mistakes_do_not_fit(tree: dict[str, Any]) -> None:
    assert list(VALIDATOR.iter_errors(tree))


@pytest.mark.parametrize(
    "tree",
    [
        {"training": {"train_iters": "1_200_000"}},  # YAML 1.2 knows no grouped digits
        {"moe": {"moe_layer_freq": "([0]*3+[1]*23)*1"}},
        {"data": {"data_path": [0.5, "a", 1, "b"], "source_max_epochs": ["a", 4]}},
        {"data": {"stages": [{"data_path": ["a"]}]}},
        {"checkpoint": {"save": None}},
    ],
    ids=str,
)
def test_what_recipes_may_say_fits(tree: dict[str, Any]) -> None:
    assert not [error.message for error in VALIDATOR.iter_errors(tree)]
