"""JSON schema of recipes, for editors: ``python -m moetron.moe.config.recipe_schema``.

Prints examples/recipe.schema.json; a test compares the two. Recipes name it in their first line
(``# yaml-language-server: $schema=...``), so that an editor completes keys, shows their
documentation and marks mistakes. It knows single values; rules over several settings are those of
--dry-run.
"""

import json
import sys
from typing import Any

from moetron.moe.config.schema.settings import Settings

Schema = dict[str, Any]
_NESTED = ("StageSettings", "StageLearningRate")
"""Definitions that stand in a recipe whole, with their required keys."""


def _relaxed(node: Any) -> Any:
    """A schema with what YAML files write besides JSON: digits grouped as in 780_000_000_000."""
    if isinstance(node, list):
        return [_relaxed(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _relaxed(value) for key, value in node.items() if key != "title"}
    if made.get("type") == "integer":
        made |= {"type": ["integer", "string"], "pattern": "^[0-9][0-9_]*$"}
    if isinstance(made.get("description"), str):
        made["description"] = " ".join(made["description"].split())
    return made


def _words(definition: Schema) -> None:
    """Let lists of words hold numbers: weights and epochs beside names."""
    for name, field in definition["properties"].items():
        for branch in (field, *field.get("anyOf", ())):
            if branch.get("items", {}).get("type") == "string":
                branch["items"] = {"type": ["string", "number"]}
            elif name == "moe_layer_freq" and "anyOf" in branch:
                branch["anyOf"].append({"type": "string", "pattern": r"\["})


def schema() -> Schema:
    """The schema (draft 2020-12) of one recipe file."""
    made: Schema = _relaxed(Settings.model_json_schema())
    made.pop("required", None)
    for name, definition in made["$defs"].items():
        if name not in _NESTED:
            definition.pop("required", None)
        if name in ("DataSettings", "StageSettings", "MoESettings"):
            _words(definition)
    for group in made["properties"].values():
        group.pop("default", None)  # the whole group's, which editors would show in full
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Moetron recipe",
    }
    return {**head, **made}


def document() -> str:
    """The schema as text."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
