"""Convert checkpoints to and from HuggingFace folders, without a GPU, one tensor at a time.

    python tools/convert_checkpoint.py to-hf   --load RUN --output DIR
    python tools/convert_checkpoint.py from-hf --load DIR --output RUN
    python tools/convert_checkpoint.py inspect --load RUN

RUN is a run folder (its latest checkpoint) or, to read from, one step_* folder, written in any
layout. After from-hf, `pretrain_moe.py --config RUN/model.yaml --load RUN --finetune ...` trains
from the weights. Exit codes: 0 done, 2 user error, 1 internal error.
"""

import argparse
import sys
from pathlib import Path

from moetron.common import threads
from moetron.common.errors import UserError
from moetron.data.chat.run_template import run_template, turn_ends
from moetron.data.chat.templates import Template
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.compatibility import tokenizer_fingerprints
from moetron.moe.checkpoint.vocabulary import vocabulary_of
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.tokenizers.export import exported, why_not
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer
from moetron.tokenizers.run_copy import keep, load_run_tokenizer, name_of

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("to-hf", help="write a folder that transformers loads")
    load = commands.add_parser("from-hf", help="write a checkpoint to start from")
    look = commands.add_parser("inspect", help="describe a checkpoint")
    look.add_argument("--verify", action="store_true", help="check the SHA-256 of every file")
    for command in (export, load, look):
        command.add_argument("--load", type=Path, required=True, help="folder to read")
    for command in (export, load):
        command.add_argument("--output", type=Path, required=True, help="folder to write")
        threads.add_option(command)
    add = export.add_argument
    add("--model-type", help="of HuggingFace (default: the one that matches)")
    add("--dtype", choices=DTYPES, help="of the weights (default: the run's)")
    add("--max-shard-bytes", type=int, default=5 * 10**9, help="largest file (default: 5e9)")
    add("--tokenizer-model", metavar="PATH", help="tokenizer (default: the copy in the run folder)")
    add("--template", help="chat template of the export (default: that of the run's chats)")
    add("--end-of-turn", type=str, metavar="TEXT", help="token that ends an answer of --template")
    add("--as-causal", action="store_true", help="export a --bidirectional-prefix model as causal")
    return parser


def to_hf(arguments: argparse.Namespace) -> None:
    """Export a checkpoint with its tokenizer."""
    import torch

    from moetron.moe.convert.to_huggingface import Export
    from moetron.moe.convert.to_huggingface import to_hf as export

    record = checkpoint_folder.read_record(checkpoint_folder.find(arguments.load))
    settings = checkpoint_folder.one_rank_settings(record)
    given, saved = arguments.tokenizer_model, settings.data.tokenizer_model
    tokenizer, known = None, tokenizer_fingerprints(record.stream)
    if given is not None or saved is not None:
        tokenizer = load_run_tokenizer(arguments.load, given, saved, known)
    vocab_size = vocabulary_of(
        arguments.load, settings, None if tokenizer is None else tokenizer.vocab_size
    )
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    template = turn_end = None
    if tokenizer is not None:
        given = arguments.template, arguments.end_of_turn
        template = run_template(record.stream, tokenizer, *given)
        turn_end = None if template is None else _turn_end(template, tokenizer)
    family = export(
        arguments.load,
        arguments.output,
        Export(
            arguments.model_type, dtype, arguments.max_shard_bytes, arguments.as_causal, turn_end
        ),
        vocab_size,
        *exported(tokenizer, None if template is None else template.source()),
        check=lambda folder: None if tokenizer is None else why_not(tokenizer, folder),
    )
    print(f"{arguments.output}: {family.architecture}")


def _turn_end(template: Template, tokenizer: Tokenizer) -> int | None:
    """Return the id that ends an answer; None, with a warning, if it is no single token."""
    ends = turn_ends(template, tokenizer)
    if ends.texts:
        print(
            f"the end of a turn, {template.end_of_turn}, is several tokens of this tokenizer: give "
            "transformers' generate `stop_strings` and `tokenizer`",
            file=sys.stderr,
        )
        return None
    return next(iter(ends.ids - {tokenizer.eod}), tokenizer.eod)


def from_hf(arguments: argparse.Namespace) -> None:
    """Import a folder with its tokenizer."""
    from moetron.moe.convert.from_huggingface import from_hf as load
    from moetron.moe.convert.initial_checkpoint import MODEL_FILE

    tokenizer: Tokenizer | None = None
    try:
        tokenizer = load_tokenizer(arguments.load)
    except UserError as error:
        print(f"without a tokenizer: {error}", file=sys.stderr)
    fingerprint = None if tokenizer is None else tokenizer.fingerprint
    source = None if tokenizer is None else name_of(tokenizer, arguments.output)
    family, settings = load(arguments.load, arguments.output, source, fingerprint)
    if tokenizer is not None:
        keep(tokenizer, arguments.output, replace=True)
    print(f"{arguments.output}: {family.architecture}, {settings.model.num_layers} layers")
    recipe = arguments.output / MODEL_FILE
    print(f"train it: pretrain_moe.py --config {recipe} --load {arguments.output} --finetune ...")


def main() -> int:
    """Convert or inspect as the command line says; return the exit code."""
    arguments = parser().parse_args()
    quieten_libraries()
    if arguments.command == "inspect":
        from moetron.moe.convert.inspect_checkpoint import describe

        print(describe(arguments.load, arguments.verify))
    else:
        threads.use_threads(arguments.cpu_threads)
        {"to-hf": to_hf, "from-hf": from_hf}[arguments.command](arguments)
    return 0
