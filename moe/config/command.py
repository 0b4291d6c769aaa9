"""Reading of flags and recipes into checked settings."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetron.common.errors import ConfigError
from moetron.common.recipes import recipe_path
from moetron.moe.config import checks, flags, machine, recipe
from moetron.moe.config.schema.derived import notes
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.paths import path_problem
from moetron.moe.config.schema.settings import Settings, fields
from moetron.moe.config.validate import Tree, validate


@dataclass(frozen=True)
class Command:
    """Parsed and checked command line."""

    settings: Settings
    config: list[Path]
    """Recipes in the order of reading."""
    dry_run: bool
    """Only check and plan."""
    check: bool
    """Check as a real start does, including inputs, and stop before any rank starts."""
    build: bool
    """In a dry run, also build the rank's shard on the meta device."""
    world_size: int
    """Ranks: --world-size in a dry run or check, else torchrun's, else 1."""
    rank: int
    """This rank: --rank in a dry run, else torchrun's, else 0."""
    notes: list[str]
    """Lines on settings without effect, to show to the user."""


def load(argv: Sequence[str]) -> Command:
    """Read flags and recipe, validate them together and check them against each other.

    Raises ConfigError with all problems at once. ``--help`` prints and exits.
    """
    given = flags.parse(argv)
    problems = list(given.problems)
    dry_run = bool(given.options.get("dry_run", False))
    check_only = bool(given.options.get("check", False))
    build = bool(given.options.get("build", False))
    if build and not dry_run:
        problems.append("--build needs --dry-run: a real run builds its model anyway")
    world_size, rank = _ranks(given.options, dry_run or check_only, problems)
    names = given.options.get("config", [])
    try:
        _refuse_addresses(names)
        config = [recipe_path(name) for name in names]
        tree = read_recipes(config)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    settings, found = check(merge(tree, given.settings), world_size, dry_run)
    valueless = {line.split()[0] for line in given.problems if line.startswith("--")}
    problems += [line for line in found if line.split()[0] not in valueless]
    if problems or settings is None:
        raise ConfigError(problems)
    lines = notes(settings)
    return Command(settings, config, dry_run, check_only, build, world_size, rank, lines)


def check(tree: Tree, world_size: int, dry_run: bool) -> tuple[Settings | None, list[str]]:
    """Return the settings of a tree, and all problems of single values and of combinations.

    Settings are None if a required field is missing or faulty; cross-checks then report only
    problems that do not depend on it. A dry run needs no inputs.
    """
    settings, problems, faulty = validate(tree)
    tried = [settings] if settings is not None else _with_stand_ins(tree, faulty)
    found = [_without(faulty, _cross_checks(one, world_size, dry_run)) for one in tried]
    problems += [line for line in found[0] if all(line in lines for lines in found)]
    return settings, problems


STAND_INS: dict[str, tuple[Any, Any]] = {
    "num_layers": (5040, 10080),
    "hidden_size": (1 << 20, 1 << 21),
    "num_attention_heads": (1, 2),
    "seq_length": (1 << 20, 1 << 21),
    "train_iters": (10**6, 10**7),
    "micro_batch_size": (1, 2),
    "global_batch_size": (5040, 10080),
    "lr": (1.0, 2.0),
}
"""Two values for each required setting: a problem with both does not depend on them."""


def _with_stand_ins(tree: Tree, faulty: set[str]) -> list[Settings]:
    """Return settings with the first and with the second stand-ins for faulty required values."""
    required = [(group, name) for group, name, field in fields() if field.is_required()]
    found = []
    for which in (0, 1):
        made: dict[str, dict[str, Any]] = {}
        for group, name in required:
            if name in faulty:
                made.setdefault(group, {})[name] = STAND_INS[name][which]
        settings, _, _ = validate(merge(tree, made))
        assert settings is not None, "stand-ins are valid"
        found.append(settings)
    return found


def _refuse_addresses(names: Sequence[str]) -> None:
    """Raise ConfigError for recipes that are not named by a path."""
    found = [(name, path_problem(name)) for name in names]
    if problems := [f"--config {name}: {problem}" for name, problem in found if problem]:
        raise ConfigError(problems)


def read_recipes(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the unchecked values of recipes by group and field; a later recipe wins.

    Raises ConfigError for a file that is not a recipe.
    """
    tree: dict[str, dict[str, Any]] = {}
    for path in paths:
        tree = merge(tree, recipe.read(path))
    return tree


def merge(first: Tree, second: Tree) -> dict[str, dict[str, Any]]:
    """Return both trees merged; the second wins."""
    groups = [*first, *(group for group in second if group not in first)]
    return {group: {**first.get(group, {}), **second.get(group, {})} for group in groups}


def _ranks(options: Mapping[str, Any], imagined: bool, problems: list[str]) -> tuple[int, int]:
    """Return (world size, rank) and append their problems to ``problems``.

    ``imagined``: the command starts no ranks, so flags may differ from torchrun's environment.
    """
    values = {"world_size": 1, "rank": 0}
    environment = {} if "world_size" in options else os.environ  # a rank of another world
    for name, lowest in (("world_size", 1), ("rank", 0)):
        if name in options and not imagined:
            needed = "--dry-run or --check"
            problems.append(f"{flag_name(name)} needs {needed}: torchrun sets it in a real run")
        text = str(options.get(name, environment.get(name.upper(), values[name])))
        if text.isdecimal() and int(text) >= lowest:
            values[name] = int(text)
        else:
            problems.append(f"{flag_name(name)} {text}: must be an integer >= {lowest}")
    if values["rank"] >= values["world_size"]:
        problems.append(
            f"--rank {values['rank']} must be below --world-size {values['world_size']}"
        )
    return values["world_size"], values["rank"]


def _cross_checks(settings: Settings, world_size: int, dry_run: bool) -> list[str]:
    """Return broken rules over several settings, and in a real run over inputs and device."""
    device = settings.parallel.device
    found = checks.problems(
        settings,
        world_size,
        device=machine.expected_device(device),
        te=machine.transformer_engine_is_installed(),
    )
    if not dry_run:
        found += checks.input_problems(settings)
        if device == "cuda" and machine.expected_device("auto") == "cpu":
            why = machine.hidden_gpus() or "there is no NVIDIA driver"
            found.append(f"--device cuda: no CUDA device here ({why}); use --device cpu or auto")
    return found


def _without(faulty: set[str], found: list[str]) -> list[str]:
    """Return cross-check lines that do not name a faulty field."""
    names = {flag_name(name) for name in faulty}
    return [line for line in found if not names & set(line.replace(":", " ").split())]
