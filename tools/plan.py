#!/usr/bin/env python
"""Plan a recipe of examples/ without data, weights or GPUs: parameters, memory, FLOPs, schedule.

    python tools/plan.py --list                      # every recipe with its parameters
    python tools/plan.py olmoe_1b_7b                 # on the fewest ranks that its layout fills
    python tools/plan.py deepseek_v3 --world-size 2048 --rank 17 [-- --flag value ...]

RECIPE is a folder of examples/ (its pretrain.yaml) or a YAML file; flags after -- win. The same as
pretrain_moe.py --dry-run, which also takes --build. Exit codes: 0 done, 2 something to mend.
"""

import argparse
import sys
from pathlib import Path

from moetron.moe.config import recipe
from moetron.moe.config.derived import smallest_world_size
from moetron.moe.config.errors import UserError
from moetron.moe.config.load import Command, load
from moetron.moe.config.parallel import ParallelSettings
from moetron.moe.plan.parameters import count_parameters
from moetron.moe.plan.render import render

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a folder of examples/, or a YAML file")
    add("--list", action="store_true", help="name every recipe")
    add("--world-size", type=int, metavar="N", help="ranks (default: the fewest)")
    add("--rank", type=int, default=0, metavar="R", help="whose memory (default: 0)")
    add("flags", nargs="*", metavar="-- FLAGS", help="of pretrain_moe.py")
    return parser


def recipe_names() -> list[str]:
    """Folders of examples/ with a model of known size (the quick start's is its tokenizer's)."""
    paths = sorted(EXAMPLES.glob("*/pretrain.yaml"))
    return [path.parent.name for path in paths if "vocab_size" in recipe.read(path)["model"]]


def find(name: str) -> Path:
    """The file of a recipe.

    Raises:
        UserError: there is none of this name.
    """
    path = EXAMPLES / name / "pretrain.yaml"
    if path.is_file():
        return path
    if Path(name).is_file():
        return Path(name)
    raise UserError(f"{name}: no recipe and no file; the recipes are {', '.join(recipe_names())}")


def planned(path: Path, world_size: int | None, rank: int, flags: list[str]) -> Command:
    """A recipe as a dry run on GPUs reads it."""
    parallel = ParallelSettings.model_validate(recipe.read(path).get("parallel", {}))
    ranks = world_size or smallest_world_size(parallel)
    argv = ["--config", str(path), "--dry-run", "--world-size", str(ranks), "--rank", str(rank)]
    return load([*argv, "--device", "cuda", *flags])


def table() -> str:
    """Every recipe in a line: parameters without token prediction, active ones, fewest ranks."""
    lines = [f"{'recipe':<20}{'total':>18}{'active':>18}{'ranks':>7}"]
    for name in recipe_names():
        command = planned(find(name), None, 0, [])
        size = command.settings.model.vocab_size
        assert size is not None
        count = count_parameters(command.settings, size)
        lines.append(f"{name:<20}{count.main:>18,}{count.active:>18,}{command.world_size:>7,}")
    return "\n".join(lines)


def main() -> int:
    """Print the list or a plan; returns the exit code."""
    options = parser().parse_args()
    if options.list == (options.recipe is not None):
        raise UserError("give one of --list and RECIPE")
    if options.list:
        print(table())
        return 0
    command = planned(find(options.recipe), options.world_size, options.rank, options.flags)
    size = command.settings.model.vocab_size
    if size is None:
        raise UserError(f"{options.recipe}: no vocabulary's size; add -- --vocab-size N")
    print(render(command.settings, size, command.world_size, command.rank))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
