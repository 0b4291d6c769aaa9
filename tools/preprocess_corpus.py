#!/usr/bin/env python
"""Turn text into token shards: .bin/.idx as Megatron reads them, and a manifest.

    python tools/preprocess_corpus.py --input 'corpus/*.jsonl' --tokenizer tok.model \
        --output-prefix data/train --append-eod

Inputs are JSONL (.jsonl, .json, also with .gz or .zst) with the text under --text-key, or any other
file as one plain-text document; folders are searched. Run again with the same inputs and settings,
it finds its work done, or goes on where it was killed. Exit codes: 0 done, 2 something to mend,
named in one message, 1 a worker died.
"""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields

from moetron.data.errors import DataError
from moetron.data.filters import Filters
from moetron.data.preprocess import Options, preprocess
from moetron.tokenizers.interface import TokenizerError

WORKER_DIED = (
    "preprocess_corpus: a worker process died, most likely of too little memory; run the same "
    "command again to go on, with fewer --workers"
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help="files, folders or globs")
    add("--text-key", default="text", help="key of the text in a JSON row (default: text)")
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="a SentencePiece .model, a HuggingFace tokenizer.json (or its folder), or 'bytes'",
    )
    add("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    add("--append-eod", action="store_true", help="end each document with the end-of-document id")
    add("--workers", type=int, default=_cores(), help="processes (default: all cores)")
    add(
        "--holdout-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of documents kept for validation, chosen by a hash of their text",
    )
    add("--holdout-prefix", metavar="Q", help="where the held-out documents go")
    add(
        "--max-bad-fraction",
        type=float,
        default=0.001,
        metavar="F",
        help="more bad rows than this share of all end the run (default: 0.001)",
    )
    add_filters(parser.add_argument_group("documents to leave out, counted in the manifest"))
    add(
        "--no-fast",
        dest="fast",
        action="store_false",
        help="encode BPE with HuggingFace's library even where gigatoken gives the same ids",
    )
    return parser


def add_filters(group: argparse._ArgumentGroup) -> None:
    """The flags of ``Filters``."""
    group.add_argument(
        "--max-repetitions",
        type=int,
        metavar="N",
        help="an n-gram of up to 13 tokens stands N times in a row (OLMoE: 32)",
    )
    group.add_argument(
        "--frequent-words",
        action="store_true",
        help="one word makes more than 30%% of the text or two more than 50%% (OLMoE, for code)",
    )
    group.add_argument("--min-tokens", type=int, default=0, help="shorter documents")
    group.add_argument("--max-tokens", type=int, help="longer documents")


def main() -> int:
    """Preprocess as the command line says; the exit code."""
    arguments = vars(parser().parse_args())
    filters = Filters(**{field.name: arguments.pop(field.name) for field in fields(Filters)})
    options = Options(inputs=arguments.pop("input"), filters=filters, **arguments)
    try:
        outcome = preprocess(options)
    except (DataError, TokenizerError, OSError) as error:
        print(f"preprocess_corpus: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(WORKER_DIED, file=sys.stderr)
        return 1
    print(f"{'current' if outcome.current else 'done'}: {outcome.summary}")
    for prefix, manifest in outcome.manifests.items():
        print(
            f"{prefix}: {manifest.documents} documents, {manifest.tokens} tokens "
            f"({manifest.dtype}), {manifest.text_bytes / max(manifest.tokens, 1):.2f} bytes a token"
        )
    return 0


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
