#!/usr/bin/env python
"""Show token shards: manifest, counts, document lengths, decoded documents; check them in full.

    python tools/inspect_data.py data/train [--tokenizer tok.model --documents 3] [--verify]
    python tools/inspect_data.py 0.7 data/code 0.3 data/prose --seq-length 4096 --samples 100000

Several prefixes, or weights and prefixes as in --data-path, are shown as a blend too. Exit codes:
0 done and sound, 2 something to mend.
"""

import argparse
import sys

from moetron.data.blend import open_blend, split_data_path
from moetron.data.errors import DataError
from moetron.data.family import members
from moetron.data.report import blend_table, length_histogram, shard_summary
from moetron.data.shard import Shard
from moetron.tokenizers.interface import TokenizerError
from moetron.tokenizers.load import load_tokenizer

PREVIEW_CHARACTERS = 400


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data_path", nargs="+", metavar="[WEIGHT] PREFIX", help="shards, as --data-path takes them")
    add("--tokenizer", metavar="PATH", help="decode documents with this tokenizer")
    add("--documents", type=int, default=2, help="documents to decode, evenly spread (default: 2)")
    add("--verify", action="store_true", help="read everything and compare hashes")
    add("--seq-length", type=int, help="show the blend of samples of this many tokens")
    add("--samples", type=int, help="length of the run whose blend is shown (default: one epoch)")
    return parser


def show_documents(shard: Shard, tokenizer_path: str, count: int) -> None:
    """Print the beginnings of ``count`` documents, evenly spread over the shard."""
    tokenizer = load_tokenizer(tokenizer_path)
    if shard.manifest and shard.manifest.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(f"{shard.prefix}: not made with the tokenizer {tokenizer_path}")
    for number in range(0, len(shard), max(1, len(shard) // max(count, 1)))[:count]:
        ids = shard.document(number)
        text = tokenizer.decode(ids[:PREVIEW_CHARACTERS].tolist())[:PREVIEW_CHARACTERS]
        print(f"  document {number}, {len(ids)} tokens: {text!r}")


def show_blend(data_path: list[str], seq_length: int, samples: int | None) -> None:
    """Print what each source gives to a run."""
    blend = open_blend(data_path, seq_length)
    epoch = sum(source.windows for source in blend.sources)
    print(blend_table(blend, epoch if samples is None else samples))


def run(arguments: argparse.Namespace) -> bool:
    """Print what was asked for; whether all shards are sound."""
    problems = []
    prefixes = split_data_path(arguments.data_path)[1]
    for prefix in (name for each in prefixes for name in members(each)):
        shard = Shard(prefix)
        print(shard_summary(shard))
        print(length_histogram(shard.document_lengths))
        if arguments.tokenizer:
            show_documents(shard, arguments.tokenizer, arguments.documents)
        if arguments.verify:
            problems += shard.verify()
    if arguments.seq_length:
        show_blend(arguments.data_path, arguments.seq_length, arguments.samples)
    for problem in problems:
        print(f"inspect_data: {problem}", file=sys.stderr)
    if arguments.verify and not problems:
        print("verified: every byte is as its manifest says")
    return not problems


def main() -> int:
    """Show what the command line names; the exit code."""
    try:
        return 0 if run(parser().parse_args()) else 2
    except (DataError, TokenizerError, OSError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
