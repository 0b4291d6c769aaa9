"""Show token shards, a blend of them, or the stages of a recipe; verify shards.

    python tools/inspect_data.py data/train [--tokenizer tok.model --documents 3] [--verify]
    python tools/inspect_data.py 0.7 data/code 0.3 data/prose --seq-length 4096 --samples 100000
    python tools/inspect_data.py --config RECIPE.yaml [--config DATA.yaml] --show 2

Shards are shown with counts, document lengths and decoded documents; several shards, or weights and
shards as in --data-path, also as a blend; a recipe with the use of each source in each stage of the
planned run, and with decoded samples. Exit codes: 0 done and valid, 2 an error to fix.
"""

import argparse
import sys
from pathlib import Path

from moetron.common.argument_types import whole_number
from moetron.common.data_path import split_data_path
from moetron.common.errors import ConfigError, UserError
from moetron.common.files import require_writable
from moetron.common.recipes import recipe_path
from moetron.data.inspect.sample_view import documents, draw_lengths, stage_samples
from moetron.data.inspect.shard_report import blend_table, length_histogram, shard_summary
from moetron.data.shards.shard import Shard
from moetron.data.shards.shard_set import members
from moetron.data.stream.blend import open_blend
from moetron.data.stream.open_streams import open_training
from moetron.data.stream.stages import use_table
from moetron.moe.config.command import read_recipes
from moetron.moe.config.schema.derived import total_samples
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.config.validate import validate
from moetron.tokenizers.load import load_tokenizer


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    parser = ToolParser(description=__doc__)
    add, count, size = parser.add_argument, whole_number(0), whole_number(1)
    add("data_path", nargs="*", metavar="[WEIGHT] PREFIX", help="shards, as --data-path takes them")
    add("--tokenizer", metavar="PATH", help="decode with this tokenizer (default: the recipe's)")
    add("--documents", type=count, default=2, help="documents to decode (default: 2)")
    add("--verify", action="store_true", help="read everything and compare hashes")
    add("--png", type=Path, metavar="FILE", help="draw the document lengths")
    add("--seq-length", type=size, help="show the blend of samples of this many tokens")
    add("--samples", type=size, help="length of the run (default: the recipe's)")
    add("--config", action="append", help="a recipe or its name; later ones override key by key")
    add("--data-root", help="base folder of the recipe's relative prefixes")
    add("--show", type=count, default=1, help="samples a stage to decode (default: 1)")
    return parser


def show_recipes(arguments: argparse.Namespace) -> None:
    """Print the stages of the recipes on the command line."""
    given = {"--verify": arguments.verify, "--png": arguments.png, "a prefix": arguments.data_path}
    if unused := [name for name, value in given.items() if value]:
        raise UserError(
            f"--config: cannot be combined with {', '.join(unused)}; give prefixes without it"
        )
    settings, problems, _ = validate(read_recipes([recipe_path(name) for name in arguments.config]))
    if settings is None or problems:
        raise ConfigError(problems)
    if arguments.data_root:
        data = settings.data.model_copy(update={"data_root": arguments.data_root})
        settings = settings.model_copy(update={"data": data})
    tokenizer = arguments.tokenizer or settings.data.tokenizer_model
    if tokenizer is None or not settings.data.planned_stages():
        raise UserError("--config: the recipe needs data; give --tokenizer and data_path or stages")
    samples = arguments.samples or total_samples(settings)
    reader, seed = load_tokenizer(tokenizer), settings.training.seed
    stream = open_training(settings.data, settings.model.seq_length, seed, reader)
    print(use_table(stream, samples))
    print(stage_samples(stream, reader, samples, arguments.show, sys.stdout.isatty()))


def show_shards(arguments: argparse.Namespace) -> bool:
    """Print the shards on the command line; return whether all are valid."""
    if arguments.png:
        require_writable(arguments.png)
    prefixes = split_data_path(arguments.data_path)[1]
    shards = [Shard(name) for prefix in prefixes for name in members(prefix)]
    for shard in shards:
        print(shard_summary(shard))
        print(length_histogram(shard.document_lengths))
        if arguments.tokenizer:
            print(documents(shard, arguments.tokenizer, arguments.documents))
    if arguments.png:
        draw_lengths({Path(s.prefix).name: s.document_lengths for s in shards}, arguments.png)
    if arguments.seq_length:
        blend = open_blend(arguments.data_path, arguments.seq_length)
        epoch = sum(source.windows for source in blend.sources)
        print(blend_table(blend, arguments.samples or epoch))
    problems = [p for shard in shards for p in shard.verify()] if arguments.verify else []
    for problem in problems:
        print(f"inspect_data: {problem}", file=sys.stderr)
    if arguments.verify and not problems:
        print("verified: all files match their manifests")
    return not problems


def main() -> int:
    """Show data by the command line; return the exit code."""
    arguments = parser().parse_args()
    try:
        if not arguments.config:
            return 0 if show_shards(arguments) else 2
        show_recipes(arguments)
    except BrokenPipeError:
        raise  # a reader such as head has enough
    except (ValueError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2
    return 0
