"""Plan a recipe of examples/ without data, weights or GPUs: parameters, memory, FLOPs, schedule.

    python tools/plan.py --list                      # every recipe: size, memory, cost
    python tools/plan.py olmoe_1b_7b                 # on the fewest ranks that its layout fills
    python tools/plan.py deepseek_v3 --world-size 2048 --rank 17 [-- --flag value ...]
    python tools/plan.py olmoe_1b_7b --published-coefficients megablocks 0.01 0.001

RECIPE is a folder of examples/ (its pretrain.yaml) or a YAML file; flags after -- override it. The
same as pretrain_moe.py --dry-run, which also takes --build. --published-coefficients instead prints
the flags that give a paper's balance loss and z-loss the same weight here (docs/numerics.md). Exit
codes: 0 done, 2 user error.
"""

import argparse
import math
from pathlib import Path

from moetron.common.errors import UserError
from moetron.common.recipes import recipe_path, recipes_folder
from moetron.moe.config import recipe
from moetron.moe.config.command import Command, load, merge
from moetron.moe.config.flags import parse
from moetron.moe.config.schema.derived import moe_layers, smallest_world_size, total_samples
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.config.schema.settings import Settings
from moetron.moe.config.validate import validate
from moetron.moe.plan.flops import flops_per_token
from moetron.moe.plan.hardware import PEAK_BF16_TFLOPS_PER_S
from moetron.moe.plan.memory import memory_per_rank
from moetron.moe.plan.parameters import count_parameters
from moetron.moe.plan.published_coefficients import (
    CONVENTIONS,
    balance_coefficient,
    z_coefficient,
)
from moetron.moe.plan.render import render

UTILISATION = 0.2
"""Fraction of peak assumed for the days in the table. OLMoE's 10 days on 256 H100 give 0.18."""
H100_FLOPS_PER_DAY = UTILISATION * PEAK_BF16_TFLOPS_PER_S["H100"] * 1e12 * 86_400


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a folder of examples/, or a YAML file")
    add("--list", action="store_true", help="print the table of examples/README.md")
    add("--world-size", type=int, metavar="N", help="ranks (default: the fewest possible)")
    add("--rank", type=int, default=0, metavar="R", help="rank whose memory is shown (default: 0)")
    names = ("CONVENTION", "AUX", "Z")
    text = f"convert coefficients published for {', '.join(CONVENTIONS)}"
    add("--published-coefficients", type=str, nargs=3, metavar=names, help=text)
    add("flags", type=str, nargs="*", metavar="-- FLAGS", help="flags of pretrain_moe.py")
    return parser


def recipe_names() -> list[str]:
    """Return the folders of examples/ whose recipe gives a vocabulary size."""
    paths = sorted(recipes_folder().glob("*/pretrain.yaml"))
    return [path.parent.name for path in paths if "vocab_size" in recipe.read(path)["model"]]


def find(name: str) -> Path:
    """Return the file of a recipe; raise ``UserError`` if there is none."""
    path = recipe_path(name)
    if path.is_file():
        return path
    raise UserError(f"{name}: no recipe and no file; the recipes are {', '.join(recipe_names())}")


def planned(path: Path, world_size: int | None, rank: int, flags: list[str]) -> Command:
    """Load a recipe as for a dry run on GPUs."""
    settings, _, _ = validate(merge(recipe.read(path), parse(flags).settings))
    ranks = world_size
    if ranks is None:  # load() reports wrong settings
        ranks = smallest_world_size(settings.parallel) if settings else 1
    argv = ["--config", str(path), "--dry-run", "--world-size", str(ranks), "--rank", str(rank)]
    return load([*argv, "--device", "cuda", *flags])


def table() -> str:
    """Return a Markdown table with one row per recipe, on the fewest ranks of its layout.

    GiB is the memory of the fullest rank; days are those of one H100 for the run's FLOPs.
    """
    names = "| recipe | total | active | ranks | GiB per rank | tokens | H100 days |"
    lines = [names, "|---" + 6 * "|--:" + "|"]
    for name in recipe_names():
        command = planned(find(name), None, 0, [])
        settings, ranks = command.settings, command.world_size
        size = settings.model.vocab_size
        assert size is not None
        count = count_parameters(settings, size)
        stages = range(settings.parallel.pipeline_model_parallel_size)
        fullest = max(memory_per_rank(settings, size, ranks, stage).total for stage in stages)
        tokens = total_samples(settings) * settings.model.seq_length
        days = flops_per_token(settings, size) * tokens / H100_FLOPS_PER_DAY
        lines.append(
            f"| {name} | {count.main:,} | {count.active:,} | {ranks:,} "
            f"| {fullest / 2**30:,.0f} | {tokens / 1e9:,.0f} B | {days:,.0f} |"
        )
    return "\n".join(lines)


def converted(settings: Settings, convention: str, aux: str, z: str) -> str:
    """Return our flags for coefficients published for another implementation."""
    flag = "--published-coefficients"
    if convention not in CONVENTIONS:
        raise UserError(f"{flag} {convention}: must be one of {', '.join(CONVENTIONS)}")
    known, moe = CONVENTIONS[convention], settings.moe
    layers, topk = sum(moe_layers(settings)), moe.moe_router_topk
    if moe.num_experts is None or not layers:
        raise UserError(f"{flag}: the recipe has no experts; add -- --num-experts N")
    balance = balance_coefficient(_number(aux), known, layers, topk, moe.num_experts)
    z_loss = z_coefficient(_number(z), known, layers, topk)
    first = " --moe-aux-loss-first-choice-only" if known.first_choice_only else ""
    return f"--moe-aux-loss-coeff {balance:.6g} --moe-z-loss-coeff {z_loss:.6g}{first}"


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"--published-coefficients {text}: must be a number >= 0")
    return number


def main() -> int:
    """Print the table, a plan or converted coefficients; return the exit code."""
    options = parser().parse_args()
    if options.list == (options.recipe is not None):
        raise UserError("give one of --list and RECIPE")
    if options.list:
        print(table())
        return 0
    command = planned(find(options.recipe), options.world_size, options.rank, options.flags)
    if options.published_coefficients:
        print(converted(command.settings, *options.published_coefficients))
        return 0
    size = command.settings.model.vocab_size
    if size is None:
        raise UserError(f"{options.recipe}: no vocabulary size; add -- --vocab-size N")
    print(render(command.settings, size, command.world_size, command.rank))
    return 0
