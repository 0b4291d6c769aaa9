"""Upcycle a dense checkpoint to a mixture of experts, without a GPU, one tensor at a time.

    python tools/upcycle.py --load DENSE --output RUN --num-experts 8 --moe-router-topk 2
    python tools/upcycle.py --load DENSE --output RUN --num-experts 64 --moe-router-topk 8 \\
      --moe-ffn-hidden-size 1024 --noise-fraction 0.5

DENSE is a run folder (its latest checkpoint), one step_* folder, or a HuggingFace folder. The
expert flags of pretrain_moe.py describe the result. Train it with `pretrain_moe.py --config
RUN/model.yaml --load RUN --finetune ...`. See docs/upcycling.md. Exit codes: 0 done, 2 user error,
1 internal error.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moetron.common import threads
from moetron.common.errors import ConfigError, UserError
from moetron.moe.config import flags
from moetron.moe.config.command import check, merge
from moetron.moe.config.schema.derived import with_tokenizer
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.config.upcycling import UpcyclingSettings
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer
from moetron.tokenizers.run_copy import find_copy, keep, load_copy, name_of


def parser() -> argparse.ArgumentParser:
    """Return the parser of all arguments but the expert flags."""
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    defaults = UpcyclingSettings()
    add = parser.add_argument
    add("--load", type=Path, required=True, help="dense model")
    add("--output", type=Path, required=True, help="folder to write")
    add("--router-init-std", type=float, default=defaults.router_init_std, help="(default: 0.02)")
    scaling: dict[str, Any] = {"dest": "weight_scaling", "action": "store_false"}
    add("--no-weight-scaling", **scaling, help="copy values unscaled")
    add("--noise-fraction", type=float, default=defaults.noise_fraction, help="values to redraw")
    add("--noise-std", type=float, default=defaults.noise_std, help="of those (default: 0.02)")
    add("--seed", type=int, default=defaults.seed, help="of router and noise")
    return threads.add_option(parser)


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a run or HuggingFace folder, None if it has none."""
    copy = find_copy(folder)
    if copy is None and not (folder / "config.json").is_file():
        return None
    try:
        return load_tokenizer(folder) if copy is None else load_copy(copy)
    except UserError as error:
        if copy is not None:
            raise
        print(f"without a tokenizer: {error}", file=sys.stderr)
        return None


def experts(words: list[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of expert flags; raise ``ConfigError`` for other flags."""
    given = flags.parse(words)
    others = list(given.options)
    for group, section in given.settings.items():
        others += section if group != "moe" else ()
    problems = given.problems + [f"{flag_name(name)} is not an expert flag" for name in others]
    if problems:
        raise ConfigError(problems)
    return given.settings


def main() -> int:
    """Upcycle the model that the command line names; return the exit code."""
    own, words = parser().parse_known_args()
    given = experts(words)
    try:
        options = UpcyclingSettings.model_validate(
            {name: getattr(own, name) for name in UpcyclingSettings.model_fields}
        )
    except ValidationError as error:
        wrong = [
            (flag_name(str(one["loc"][0])), one["input"], one["msg"]) for one in error.errors()
        ]
        raise ConfigError([f"{flag} {value}: {rule}" for flag, value, rule in wrong]) from error
    quieten_libraries()
    from moetron.moe.convert.initial_checkpoint import MODEL_FILE  # torch: seconds
    from moetron.moe.convert.upcycle import dense_folder, dense_run, is_huggingface, upcycle

    threads.use_threads(own.cpu_threads)
    tokenizer = tokenizer_of(own.load)
    name = None if tokenizer is None else name_of(tokenizer, own.output)
    fingerprint = None if tokenizer is None else tokenizer.fingerprint
    if is_huggingface(own.load):
        dense = dense_folder(own.load, name, fingerprint)
    else:
        dense = dense_run(own.load)
    if name is not None:
        dense = replace(dense, settings=with_tokenizer(dense.settings, name))
    tree = merge(dense.settings.model_dump(mode="json"), given)
    settings, problems = check(tree, world_size=1, dry_run=True)
    if problems or settings is None:
        raise ConfigError(problems)
    upcycle(dense, own.output, settings.moe, options)
    if tokenizer is not None:
        keep(tokenizer, own.output, replace=True)
    print(f"{own.output}: {settings.moe.num_experts} experts per layer")
    recipe = own.output / MODEL_FILE
    print(f"train it: pretrain_moe.py --config {recipe} --load {own.output} --finetune ...")
    return 0
