"""Train an umT5-style tokenizer (SentencePiece unigram, byte fallback) on JSONL.

Writes PREFIX.model, PREFIX.json (options, inputs, fingerprint, fertility by source) and
PREFIX.fertility.png. A repeated run with the same inputs and options finds them current and does
nothing.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moetron.common.argument_types import positive_number
from moetron.common.errors import UserError
from moetron.common.files import atomic_file, beside, require_writable
from moetron.data.corpora.labels import labelled_texts
from moetron.data.readers.first_rows import require_texts
from moetron.data.readers.input_files import find_files
from moetron.moe.config.schema.paths import ToolParser
from moetron.tokenizers.fertility import draw, measure, table
from moetron.tokenizers.train import TrainingOptions, is_current, train
from moetron.tokenizers.training_sample import sample_sources
from moetron.tokenizers.umt5 import SentencePieceTokenizer


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    add("--text-key", default="text", help="key of the text (default: %(default)s)")
    add("--output", type=Path, required=True, metavar="PREFIX", help="PREFIX.model, PREFIX.json")
    add("--vocab-size", type=int, default=8192, help="sentinels included (default: %(default)s)")
    add("--sentinels", type=int, default=100, help="<extra_id_i> pieces (default: %(default)s)")
    add("--character-coverage", type=float, default=0.9995, help="default: %(default)s")
    add("--split-digits", action="store_true", help="every digit is a piece of its own")
    add("--pieces-span-words", action="store_true", help="allow pieces across spaces (umT5)")
    add("--sample-mb", type=positive_number, default=10, help="million characters to train on")
    add(
        "--unimax", type=positive_number, metavar="N", help="balance sources, at most N epochs each"
    )
    add("--seed", type=int, default=1234, help="seed of the sample (default: %(default)s)")
    return parser.parse_args(arguments)


def recipe(args: argparse.Namespace, options: TrainingOptions, paths: list[Path]) -> dict[str, Any]:
    """Return everything that the model is a function of."""
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    return {
        "options": dataclasses.asdict(options),
        "sentencepiece": version("sentencepiece"),
        "text_key": args.text_key,
        "sample_mb": args.sample_mb,
        "unimax": args.unimax,
        "seed": args.seed,
        "inputs": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def run(arguments: list[str] | None = None) -> int:
    """Sample, train, measure and write; return the exit code."""
    args = parse(arguments)
    fields = {field.name for field in dataclasses.fields(TrainingOptions)}
    options = TrainingOptions(**{k: v for k, v in vars(args).items() if k in fields})
    paths = find_files(args.input)
    model_path, sidecar_path = beside(args.output, ".model"), beside(args.output, ".json")
    if problems := options.problems():
        raise UserError("\n".join(problems))
    if sidecar_path.resolve() in {path.resolve() for path in paths}:
        raise UserError(f"--output {args.output}: would overwrite the input {sidecar_path}")
    made_from = recipe(args, options, paths)
    if is_current(model_path, sidecar_path, made_from):
        print(f"{model_path} is current")
        return 0
    require_writable(args.output)  # before hours of training
    for problem in require_texts(paths, args.text_key, max_bad_fraction=1.0):
        print(f"train_tokenizer: {problem}; its rows without text are skipped", file=sys.stderr)
    started = time.monotonic()
    budget = round(args.sample_mb * 1e6)
    sample = sample_sources(
        lambda: labelled_texts(paths, args.text_key), budget, args.unimax, args.seed
    )
    drawn = sum(len(block) for found in sample.values() for block in found)
    if drawn == 0:
        raise UserError(f"--input: no text in {len(paths)} files; give files with text")
    print(f"training {options.vocab_size} pieces on {drawn / 1e6:.1f} M characters ...", flush=True)
    model = train((block for found in sample.values() for block in found), options)
    with atomic_file(model_path) as file:
        file.write(model)
    tokenizer = SentencePieceTokenizer(model_path)
    fertility = {source: measure(tokenizer, found) for source, found in sample.items()}
    with atomic_file(beside(args.output, ".fertility.png")) as file:
        draw(fertility, file)
    sidecar = {
        "kind": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint,
        "sha256": hashlib.sha256(model).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "made_from": made_from,
        "fertility_on_training_text": {k: dataclasses.asdict(v) for k, v in fertility.items()},
    }
    with atomic_file(sidecar_path) as file:
        file.write(json.dumps(sidecar, indent=2, ensure_ascii=False).encode())
    print(table(fertility))
    print(f"{model_path}: {tokenizer.vocab_size} ids, {time.monotonic() - started:.0f} s")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; raise UserError for a file that cannot be used."""
    try:
        return run(arguments)
    except OSError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        print("train_tokenizer: stopped", file=sys.stderr)
        return 130
