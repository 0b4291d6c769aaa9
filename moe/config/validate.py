"""Validation of a tree of values, with pydantic's errors as readable messages."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moetron.common.text import value_text
from moetron.moe.config.schema.data import StageLearningRate, StageSettings
from moetron.moe.config.schema.field import (
    Rule,
    flag_name,
    is_optional,
    literals,
    nearest,
    type_text,
)
from moetron.moe.config.schema.settings import Settings, fields
from moetron.moe.config.synonyms import key_answer

Tree = Mapping[str, Mapping[str, Any]]


def _unknown_keys(tree: Tree) -> list[str]:
    """Return a problem for each unknown section or key."""
    home = {name: group for group, name, _ in fields()}
    problems = []
    for group, section in tree.items():
        if group not in Settings.model_fields:
            problems.append(f"unknown section `{group}:`{nearest(group, Settings.model_fields)}")
            continue
        for name in section:
            if name not in home:
                problems.append(f"unknown key `{name}` under `{group}:`{key_answer(name, home)}")
            elif home[name] != group:
                problems.append(f"key `{name}` belongs under `{home[name]}:`, not `{group}:`")
    return problems


def _known(tree: Tree) -> dict[str, dict[str, Any]]:
    """Return the tree without unknown sections and keys, with every group present."""
    kept: dict[str, dict[str, Any]] = {group: {} for group in Settings.model_fields}
    for group, name, _ in fields():
        if name in tree.get(group, {}):
            kept[group][name] = tree[group][name]
    return kept


def _problem(
    group: str, name: str, field: FieldInfo, value: Any, missing: bool, error: object
) -> str:
    """Return the problem of one field's value and the rule it breaks.

    ``error``: the error of our own validator; None: the error is pydantic's.
    """
    flag = flag_name(name)
    if missing:
        return f"{flag} is missing ({field.description}); or `{name}` under `{group}:` in a recipe"
    if isinstance(error, Rule):
        return f"{flag} {value_text(value, 'null')}: {error}"
    unset = ", or null" if is_optional(field) else ""
    hint = nearest(value, literals(field)) if isinstance(value, str) else ""
    reason = f": {error}" if error else ""
    return f"{flag} {value_text(value, 'null')}: must be {type_text(field)}{unset}{hint}{reason}"


def _inside(detail: ErrorDetails) -> str | None:
    """Return the problem inside a mapping of a list, such as a stage, or None."""
    _, _, *place = detail["loc"]
    if len(place) < 2 or not isinstance(place[-1], str):
        return None
    where = ".".join(str(part + 1) if isinstance(part, int) else part for part in place[:-1])
    kind, key = detail["type"], place[-1]
    if kind == "missing":
        return f"entry {where} lacks `{key}`"
    if kind == "extra_forbidden":
        known = StageSettings.model_fields | StageLearningRate.model_fields
        return f"entry {where} has the unknown key `{key}`{nearest(key, known)}"
    return f"entry {where}, `{key}` {value_text(detail['input'], 'null')}: {detail['msg']}"


def validate(tree: Tree) -> tuple[Settings | None, list[str], set[str]]:
    """Return (settings, problems, names of faulty fields).

    A faulty field with a default falls back to it, so that cross-checks can check the rest;
    settings are None if a required field is missing or faulty.
    """
    problems = _unknown_keys(tree)
    kept = _known(tree)
    faulty: set[str] = set()
    try:
        return Settings.model_validate(kept), problems, faulty
    except ValidationError as error:
        details = error.errors(include_url=False)
    known = {(group, name): field for group, name, field in fields()}
    for detail in details:
        group, name = str(detail["loc"][0]), str(detail["loc"][1])
        inside = _inside(detail)
        if name in faulty and inside is None:  # a union reports each of its branches
            continue
        faulty.add(name)
        if inside is not None:  # of a long value: only its part is shown
            problems.append(f"{flag_name(name)}: {inside}")
            continue
        missing = detail["type"] == "missing" and len(detail["loc"]) == 2
        value = kept[group].get(name)
        own = detail.get("ctx", {}).get("error")
        problems.append(_problem(group, name, known[group, name], value, missing, own))
    if any(known[group, name].is_required() for group, name in known if name in faulty):
        return None, problems, faulty
    for group, name in known:
        if name in faulty:
            del kept[group][name]
    return Settings.model_validate(kept), problems, faulty
