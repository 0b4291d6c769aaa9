"""Sweep files: a base recipe, variants of it, and seeds.

sweep:
  base: ../olmoe_1b_7b/tiny.yaml   # or a list; relative to the file
  seeds: [1, 2, 3]
overrides:                         # sections of a recipe, for every variant
  training: {train_iters: 200}
variants:                          # the first is the baseline
  olmoe: {}
  no_z_loss:
    moe: {moe_z_loss_coeff: null}
  upcycled:
    upcycle: {variant: dense}      # starts from that variant's run of the same seed
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, ValidationError, field_validator

from moetron.common.errors import ConfigError, UserError
from moetron.moe.checkpoint.compatibility import SHAPE
from moetron.moe.config import recipe
from moetron.moe.config.command import check, merge, read_recipes
from moetron.moe.config.schema.field import Group, flag_name, nearest
from moetron.moe.config.schema.settings import Settings
from moetron.moe.config.upcycling import UpcyclingSettings, upcycling_problems
from moetron.moe.config.validate import Tree

_SECTIONS = ("sweep", "overrides", "variants")
_NAME = re.compile(r"[\w.-]+")


class Upcycle(UpcyclingSettings):
    """A variant's start from another one's last checkpoint; the seed is the run's."""

    variant: str
    """The dense one."""


class Head(Group):
    """The section ``sweep``."""

    base: list[str]
    """Recipes, relative to the sweep's file; a later one wins."""
    seeds: list[NonNegativeInt]
    """``--seed`` of each variant's runs: initialisation, dropout and order of the data."""
    ranks: PositiveInt = 1
    """Processes of one run."""

    @field_validator("base", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


@dataclass(frozen=True, eq=False)
class Run:
    """One variant with one seed; equal to itself alone."""

    variant: str
    settings: Settings
    upcycle: Upcycle | None = None

    @property
    def seed(self) -> int:
        """Its ``--seed``."""
        return self.settings.training.seed

    @property
    def name(self) -> str:
        """Where it lies below the sweep's folder."""
        return f"{self.variant}/seed_{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """All runs, those that start from others last."""

    name: str
    ranks: int
    variants: list[str]
    """In the file's order; the first is the baseline."""
    runs: list[Run]

    def of(self, variant: str) -> list[Run]:
        """The runs of a variant, seed by seed."""
        return [run for run in self.runs if run.variant == variant]

    def source(self, run: Run) -> Run | None:
        """The run that ``run`` is upcycled from."""
        if run.upcycle is None:
            return None
        wanted = run.upcycle.variant, run.seed
        return next(other for other in self.runs if (other.variant, other.seed) == wanted)


def read(path: Path, flags: Tree) -> Sweep:
    """Read a sweep's file and check the settings of every variant, without inputs.

    Args:
        path: the file.
        flags: settings of the command line, which win over recipes, overrides and variants.

    Raises:
        UserError: all problems of all variants, one a line.
    """
    tree = recipe.read(path, source="")
    unknown = [name for name in tree if name not in _SECTIONS]
    if unknown or not tree.get("variants"):
        wrong = [f"unknown section `{name}:`{nearest(name, _SECTIONS)}" for name in unknown]
        raise UserError(f"{path}: {'; '.join(wrong) or '`variants:` is missing or empty'}")
    try:
        head = Head.model_validate(tree.get("sweep", {}))
    except ValidationError as error:
        raise UserError(_text(f"{path}: sweep", error)) from error
    if not head.seeds or len(set(head.seeds)) < len(head.seeds):
        raise UserError(f"{path}: sweep: `seeds` must be some numbers, each once")
    recipes = read_recipes([path.parent / name for name in head.base])
    base = merge(recipes, _sections(f"{path}: overrides", tree.get("overrides", {})))
    problems: list[str] = []
    runs: list[Run] = []
    for name, variant in tree["variants"].items():
        try:
            runs += _runs(name, variant or {}, base, flags, head)
        except UserError as error:
            lines = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
            problems += [f"{path}: {name}: {line}" for line in lines]
    variants = list(tree["variants"])
    problems += [f"{path}: {line}" for run in runs for line in _upcycling_problems(run, runs)]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    runs.sort(key=lambda run: run.upcycle is not None)
    return Sweep(path.stem, head.ranks, variants, runs)


def _runs(name: str, variant: Tree, base: Tree, flags: Tree, head: Head) -> list[Run]:
    """One variant's runs; UserError lists what is wrong with it."""
    if not _NAME.fullmatch(name):
        raise UserError("a variant's name must be letters, digits, `_`, `-` and `.`")
    changes = _sections("sections", variant)
    upcycle = None
    try:
        if (options := changes.pop("upcycle", None)) is not None:
            upcycle = Upcycle.model_validate(options)
    except ValidationError as error:
        raise UserError(_text("upcycle", error)) from error
    tree = merge(merge(base, changes), flags)
    runs = []
    for seed in head.seeds:
        seeded = merge(tree, {"training": {"seed": seed}})
        settings, problems = check(seeded, head.ranks, dry_run=True)
        if problems or settings is None:
            raise ConfigError(problems)
        own = upcycle and upcycle.model_copy(update={"seed": seed})
        runs.append(Run(name, settings, own))
    return runs


def _sections(where: str, tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A tree whose sections are mappings, empty ones too."""
    wrong = [name for name, section in tree.items() if not isinstance(section, dict | None)]
    if wrong:
        raise UserError(f"{where}: `{wrong[0]}` must hold keys and values")
    return {name: section or {} for name, section in tree.items()}


def _upcycling_problems(run: Run, runs: list[Run]) -> list[str]:
    """What is wrong with a run's start."""
    if run.upcycle is None:
        return []
    wanted = run.upcycle.variant, run.seed
    source = next((other for other in runs if (other.variant, other.seed) == wanted), None)
    if source is None or source.upcycle is not None:
        reason = "is no variant" if source is None else "starts from another one itself"
        return [f"{run.variant}: upcycle: `{wanted[0]}` {reason}"]
    differing = [
        f"{flag_name(name)} differs from that of {source.variant}, which it starts from"
        for group in ("model", "attention")
        for name in SHAPE[group]
        if getattr(getattr(run.settings, group), name)
        != getattr(getattr(source.settings, group), name)
    ]
    found = differing + upcycling_problems(source.settings, run.settings)
    return [f"{run.variant}: {problem}" for problem in found]


def _text(where: str, error: ValidationError) -> str:
    """Pydantic's findings, one a line."""
    return "\n".join(
        f"{where}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        for detail in error.errors(include_url=False)
    )
