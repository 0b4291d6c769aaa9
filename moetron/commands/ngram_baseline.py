"""Cross-entropies, in nats per token, of a unigram and an interpolated bigram model.

Both are fitted to all tokens of the training shards and evaluated on the windows of the validation
shards that models are evaluated on. A trained model should be below the bigram.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moetron.common.errors import UserError
from moetron.common.files import atomic_file, require_writable
from moetron.data.inspect.ngrams import NgramModels, cross_entropies
from moetron.data.shards.shard import Shard
from moetron.data.stream.blend import open_blend
from moetron.data.stream.token_stream import TokenStream, validation_stream
from moetron.moe.config.schema.paths import ToolParser

BATCH_TOKENS = 1 << 20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--train-data-path", nargs="+", required=True, metavar="PREFIX", help="as --data-path")
    add("--valid-data-path", nargs="+", required=True, metavar="PREFIX", help="the same")
    add("--seq-length", type=int, required=True, help="tokens of a window")
    add("--windows", type=int, help="number of windows, spread evenly (default: all)")
    add("--vocab-size", type=int, help="default: the tokenizer's, else the largest id seen + 1")
    add("--output", type=Path, metavar="FILE", help="write the metrics as JSON")
    return parser.parse_args(arguments)


def batches(
    stream: TokenStream, windows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (tokens, labels, loss mask) of several windows at a time."""
    step = max(1, BATCH_TOKENS // stream.seq_length)
    for start in range(0, windows, step):
        batch = stream.batch(range(start, min(start + step, windows)))
        yield batch["tokens"], batch["labels"], batch["loss_mask"]


def ids_below(shard: Shard) -> int:
    """Return the tokenizer's vocabulary size, or without a manifest the largest id plus 1."""
    if shard.manifest is not None:
        return shard.manifest.tokenizer.vocab_size
    return int(shard.tokens.max()) + 1


def run(arguments: list[str] | None = None) -> int:
    """Fit, evaluate and print; return the exit code."""
    args = parse(arguments)
    started = time.monotonic()
    if args.output is not None:
        require_writable(args.output)  # before counting
    blend = open_blend(args.train_data_path, args.seq_length)
    training = [shard for source in blend.sources for shard in source.shards]
    stream = validation_stream(args.valid_data_path, args.seq_length, at_most=args.windows)
    windows = len(stream)
    shards = training + [shard for source in stream.sources for shard in source.shards]
    vocab_size = args.vocab_size or max(ids_below(shard) for shard in shards)
    for shard in shards:
        if len(shard.tokens) and (found_id := int(shard.tokens.max())) >= vocab_size:
            raise UserError(
                f"{shard.bin_path}: holds id {found_id}; the vocabulary has {vocab_size}"
            )
    models = NgramModels((shard.tokens for shard in training), vocab_size)
    found = cross_entropies(models, batches(stream, windows))
    metrics = {
        "unigram_cross_entropy": found.unigram,
        "bigram_cross_entropy": found.bigram,
        "bigram_model": "interpolated modified Kneser-Ney",
        "validation_tokens": found.tokens,
        "training_tokens": models.training_tokens,
        "windows": windows,
        "seq_length": args.seq_length,
        "vocab_size": vocab_size,
    }
    print(f"fitted to {models.training_tokens:,} tokens, {vocab_size:,} ids")
    print(f"evaluated on {found.tokens:,} tokens of {windows:,} windows, nats per token:")
    print(f"  unigram                          {found.unigram:.4f}")
    print(f"  bigram (modified Kneser-Ney)     {found.bigram:.4f}")
    print(f"{time.monotonic() - started:.1f} s")
    if args.output is not None:
        with atomic_file(args.output) as file:
            file.write(json.dumps(metrics, indent=2).encode() + b"\n")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; raise UserError for a file that cannot be used."""
    try:
        return run(arguments)
    except OSError as error:
        raise UserError(str(error)) from error
