"""Sweep files: a base recipe, variants of it, and seeds.

sweep:
  base: ../olmoe_1b_7b/tiny.yaml   # relative to the file; or a recipe's name; or a list
  seeds: [1, 2, 3]
overrides:                         # recipe sections for every variant
  training: {train_iters: 200}
variants:                          # the first is the baseline
  olmoe: {}
  no_z_loss:
    moe: {moe_z_loss_coeff: null}
  upcycled:
    upcycle: {variant: dense}      # start from that variant's run of the same seed
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, ValidationError, field_validator

from moetron.common.errors import ConfigError, UserError
from moetron.common.recipes import recipe_path
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
    """Options to upcycle another variant's last checkpoint, with the seed of the run."""

    variant: str
    """Dense variant to start from."""


class Head(Group):
    """Section ``sweep``."""

    base: list[str]
    """Recipes, relative to the sweep file; later ones override earlier ones."""
    seeds: list[NonNegativeInt]
    """``--seed`` of the runs of each variant: initialisation, dropout and data order."""
    ranks: PositiveInt = 1
    """Processes per run."""

    @field_validator("base", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


@dataclass(frozen=True, eq=False)
class Run:
    """One variant with one seed, compared by identity."""

    variant: str
    settings: Settings
    upcycle: Upcycle | None = None

    @property
    def seed(self) -> int:
        """Return its ``--seed``."""
        return self.settings.training.seed

    @property
    def name(self) -> str:
        """Return its path below the folder of the sweep."""
        return f"{self.variant}/seed_{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """All runs, upcycled ones last."""

    name: str
    ranks: int
    variants: list[str]
    """In file order; the first is the baseline."""
    runs: list[Run]

    def of(self, variant: str) -> list[Run]:
        """Return the runs of a variant, by seed."""
        return [run for run in self.runs if run.variant == variant]

    def source(self, run: Run) -> Run | None:
        """Return the run that ``run`` is upcycled from."""
        if run.upcycle is None:
            return None
        wanted = run.upcycle.variant, run.seed
        return next(other for other in self.runs if (other.variant, other.seed) == wanted)


def read(path: Path, flags: Tree) -> Sweep:
    """Read a sweep file and check the settings of every variant, but not its inputs.

    Args:
        path: the file.
        flags: command-line settings, which override recipes, overrides and variants.

    Raises:
        UserError: lists all problems of all variants, one per line.
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
        raise UserError(f"{path}: sweep: `seeds` must be distinct numbers, at least one")
    recipes = read_recipes([_recipe(path.parent, name) for name in head.base])
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


def _recipe(folder: Path, name: str) -> Path:
    """Return the file of a base: relative to the sweep's folder, else what --config would take."""
    near = folder / name
    shipped = recipe_path(name)
    return shipped if not near.is_file() and shipped.is_file() else near


def _runs(name: str, variant: Tree, base: Tree, flags: Tree, head: Head) -> list[Run]:
    """Return the runs of a variant; raise ``UserError`` with all its problems."""
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
    """Return a tree with empty sections as mappings; raise ``UserError`` for other values."""
    wrong = [name for name, section in tree.items() if not isinstance(section, dict | None)]
    if wrong:
        raise UserError(f"{where}: `{wrong[0]}` must be a mapping")
    return {name: section or {} for name, section in tree.items()}


def _upcycling_problems(run: Run, runs: list[Run]) -> list[str]:
    """Return the problems of upcycling a run."""
    if run.upcycle is None:
        return []
    wanted = run.upcycle.variant, run.seed
    source = next((other for other in runs if (other.variant, other.seed) == wanted), None)
    if source is None or source.upcycle is not None:
        reason = "is not a variant" if source is None else "is itself upcycled"
        return [f"{run.variant}: upcycle: `{wanted[0]}` {reason}"]
    differing = [
        f"{flag_name(name)} differs from that of its source {source.variant}"
        for group in ("model", "attention")
        for name in SHAPE[group]
        if getattr(getattr(run.settings, group), name)
        != getattr(getattr(source.settings, group), name)
    ]
    found = differing + upcycling_problems(source.settings, run.settings)
    return [f"{run.variant}: {problem}" for problem in found]


def _text(where: str, error: ValidationError) -> str:
    """Return pydantic's errors, one per line."""
    return "\n".join(
        f"{where}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        for detail in error.errors(include_url=False)
    )
