"""Plan a recipe of examples/ without data, weights or GPUs: parameters, memory, FLOPs, schedule.

    python tools/plan.py --list                      # every recipe: size, memory, cost
    python tools/plan.py olmoe_1b_7b                 # on the fewest ranks that its layout fills
    python tools/plan.py deepseek_v3 --world-size 2048 --rank 17 [-- --flag value ...]

RECIPE is a folder of examples/ (its pretrain.yaml) or a YAML file; flags after -- win. The same as
pretrain_moe.py --dry-run, which also takes --build. Exit codes: 0 done, 2 something to mend.
"""

import argparse
from pathlib import Path

from moetron.common.errors import UserError
from moetron.common.recipes import recipe_path, recipes_folder
from moetron.moe.config import recipe
from moetron.moe.config.command import Command, load, merge
from moetron.moe.config.flags import parse
from moetron.moe.config.schema.derived import smallest_world_size, total_samples
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.config.validate import validate
from moetron.moe.plan.flops import flops_per_token
from moetron.moe.plan.hardware import PEAK_BF16_TFLOPS_PER_S
from moetron.moe.plan.memory import memory_per_rank
from moetron.moe.plan.parameters import count_parameters
from moetron.moe.plan.render import render

UTILISATION = 0.2
"""Share of the peak that the table's days assume: OLMoE's 256 H100 for 10 days come to 0.18."""
H100_FLOPS_PER_DAY = UTILISATION * PEAK_BF16_TFLOPS_PER_S["H100"] * 1e12 * 86_400


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a folder of examples/, or a YAML file")
    add("--list", action="store_true", help="every recipe, as examples/README.md")
    add("--world-size", type=int, metavar="N", help="ranks (default: the fewest)")
    add("--rank", type=int, default=0, metavar="R", help="whose memory (default: 0)")
    add("flags", type=str, nargs="*", metavar="-- FLAGS", help="of pretrain_moe.py")
    return parser


def recipe_names() -> list[str]:
    """Folders of examples/ with a model of known size (the quick start's is its tokenizer's)."""
    paths = sorted(recipes_folder().glob("*/pretrain.yaml"))
    return [path.parent.name for path in paths if "vocab_size" in recipe.read(path)["model"]]


def find(name: str) -> Path:
    """The file of a recipe.

    Raises:
        UserError: there is none of this name.
    """
    path = recipe_path(name)
    if path.is_file():
        return path
    raise UserError(f"{name}: no recipe and no file; the recipes are {', '.join(recipe_names())}")


def planned(path: Path, world_size: int | None, rank: int, flags: list[str]) -> Command:
    """A recipe as a dry run on GPUs reads it."""
    settings, _, _ = validate(merge(recipe.read(path), parse(flags).settings))
    ranks = world_size
    if ranks is None:  # load() says what is wrong with the settings
        ranks = smallest_world_size(settings.parallel) if settings else 1
    argv = ["--config", str(path), "--dry-run", "--world-size", str(ranks), "--rank", str(rank)]
    return load([*argv, "--device", "cuda", *flags])


def table() -> str:
    """Every recipe in a line of Markdown, on the fewest ranks that its layout fills.

    GiB is the fullest rank's memory there; days, one H100's for the model FLOPs of the whole run.
    """
    names = "| recipe | total | active | ranks | GiB a rank | tokens | H100 days |"
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
