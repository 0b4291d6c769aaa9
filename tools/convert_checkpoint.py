#!/usr/bin/env python
"""Convert checkpoints to and from folders of HuggingFace's, without a GPU, one tensor at a time.

    python tools/convert_checkpoint.py to-hf   --load RUN --output DIR
    python tools/convert_checkpoint.py from-hf --load DIR --output RUN
    python tools/convert_checkpoint.py inspect --load RUN

RUN is a run's folder (its latest checkpoint) or, to read from, one step_* folder, written in any
layout. After from-hf, `pretrain_moe.py --config RUN/model.yaml --load RUN --finetune ...` goes on
from the weights. Exit codes: 0 done, 2 something for the user to change, 1 our fault.
"""

import argparse
import sys
from pathlib import Path

from moetron.common.errors import UserError
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.vocabulary import vocabulary_of
from moetron.moe.config.paths import ToolParser
from moetron.moe.host import threads
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.tokenizers.export import exported
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("to-hf", help="write a folder that transformers loads")
    load = commands.add_parser("from-hf", help="write a checkpoint to start from")
    look = commands.add_parser("inspect", help="say what a checkpoint holds")
    look.add_argument("--verify", action="store_true", help="hold every file against its sum")
    for command in (export, load, look):
        command.add_argument("--load", type=Path, required=True, help="what to read")
    for command in (export, load):
        command.add_argument("--output", type=Path, required=True, help="folder to write")
        threads.add_option(command)
    add = export.add_argument
    add("--model-type", help="HuggingFace's (default: the one that fits)")
    add("--dtype", choices=DTYPES, help="of the weights (default: the run's)")
    add("--max-shard-bytes", type=int, default=5 * 10**9, help="of one file (default: 5e9)")
    add("--tokenizer-model", metavar="PATH", help="the run's tokenizer, if moved")
    add("--as-causal", action="store_true", help="export a --bidirectional-prefix model, too")
    return parser


def to_hf(arguments: argparse.Namespace) -> None:
    """Export a checkpoint with its tokenizer."""
    import torch

    from moetron.moe.convert.to_huggingface import Export
    from moetron.moe.convert.to_huggingface import to_hf as export

    record = checkpoint_folder.read_record(checkpoint_folder.find(arguments.load))
    settings = checkpoint_folder.one_rank_settings(record)
    source = arguments.tokenizer_model or settings.data.tokenizer_model
    tokenizer = None if source is None else open_tokenizer(source)
    ids = None if tokenizer is None else tokenizer.vocab_size
    vocab_size = vocabulary_of(arguments.load, settings, ids)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    family = export(
        arguments.load,
        arguments.output,
        Export(arguments.model_type, dtype, arguments.max_shard_bytes, arguments.as_causal),
        vocab_size,
        *exported(tokenizer),
    )
    print(f"{arguments.output}: {family.architecture}")


def from_hf(arguments: argparse.Namespace) -> None:
    """Import a folder with its tokenizer."""
    from moetron.moe.convert.from_huggingface import from_hf as load
    from moetron.moe.convert.initial_checkpoint import MODEL_FILE

    source = fingerprint = None
    try:
        fingerprint = load_tokenizer(arguments.load).fingerprint
        source = str(arguments.load.resolve())
    except UserError as error:
        print(f"without a tokenizer: {error}", file=sys.stderr)
    family, settings = load(arguments.load, arguments.output, source, fingerprint)
    print(f"{arguments.output}: {family.architecture}, {settings.model.num_layers} layers")
    recipe = arguments.output / MODEL_FILE
    print(f"go on: pretrain_moe.py --config {recipe} --load {arguments.output} --finetune ...")


def open_tokenizer(source: str) -> Tokenizer:
    """The tokenizer at ``source``."""
    try:
        return load_tokenizer(source)
    except UserError as error:
        raise UserError(f"{error}; if it moved, give --tokenizer-model") from error


def main() -> int:
    """Convert what the command line asks for; the exit code."""
    arguments = parser().parse_args()
    quieten_libraries()
    if arguments.command == "inspect":
        from moetron.moe.convert.inspect_checkpoint import describe

        print(describe(arguments.load, arguments.verify))
    else:
        threads.use_threads(arguments.cpu_threads)
        {"to-hf": to_hf, "from-hf": from_hf}[arguments.command](arguments)
    return 0


if __name__ == "__main__":
    from moetron.moe.training.resilience import run_guarded

    sys.exit(run_guarded(main))
