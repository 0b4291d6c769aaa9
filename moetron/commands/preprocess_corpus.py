"""Preprocess text to token shards: Megatron's .bin/.idx and a manifest.

    python tools/preprocess_corpus.py --input 'corpus/*.jsonl' --tokenizer tok.model \\
        --output-prefix data/train --append-eod

Inputs are JSONL (.jsonl, .json, also with .gz or .zst), Parquet or Arrow (HuggingFace datasets on
disk) with the text under --text-key, or any other file as one plain-text document; folders are
searched; - is JSONL on standard input. A repeated run with the same inputs and settings finds its
output current, or resumes where it was killed. Exit codes: 0 done, 2 an error to fix, named in one
message, 1 a worker died, 75 stopped by a signal (SIGINT, SIGTERM): run it again to resume.
"""

import gc
import signal
import sqlite3
import sys
from concurrent.futures import BrokenExecutor

from moetron.common.errors import UserError
from moetron.data.prepare.options import Options, add_flags
from moetron.data.prepare.preprocess import preprocess
from moetron.moe.config.schema.paths import ToolParser

MEGATRON = {
    "--json-keys": "use --text-key",
    "--tokenizer-model": "use --tokenizer",
    "--tokenizer-type": "leave it out: the file of --tokenizer determines it",
    "--vocab-file": "give --tokenizer a tokenizer.json",
    "--merge-file": "give --tokenizer a tokenizer.json",
    "--partitions": "use --share I/N and --merge-shares N",
    "--split-sentences": "not supported: documents are not split",
}
"""Flags of Megatron-LM's tools/preprocess_data.py with another name here."""

WORKER_DIED = (
    "preprocess_corpus: a worker process died, most likely of too little memory; run the same "
    "command again to resume, with fewer --workers"
)

NOT_WRITTEN = (
    "preprocess_corpus: --output-prefix {}: {}; fix this and run the same command to resume"
)


def main() -> int:
    """Preprocess by the command line; return the exit code."""
    parser = ToolParser(description=__doc__)
    add_flags(parser)
    parser.add_foreign(MEGATRON)
    options = Options.of(parser.parse_args())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcome = preprocess(options)
    except UserError as error:
        print(f"preprocess_corpus: {error}", file=sys.stderr)
        return 2
    except (OSError, sqlite3.Error) as error:
        problem = f"{error}" if getattr(error, "filename", None) else f"{error} while writing"
        print(NOT_WRITTEN.format(options.output_prefix, problem), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("preprocess_corpus: stopped; run the same command to resume", file=sys.stderr)
        return 75
    except BrokenExecutor:
        print(WORKER_DIED, file=sys.stderr)
        return 1
    print(f"{'current' if outcome.current else 'done'}: {outcome.summary}")
    for prefix, manifest in outcome.manifests.items():
        print(
            f"{prefix}: {manifest.documents} documents, {manifest.tokens} tokens "
            f"({manifest.dtype}), {manifest.text_bytes / max(manifest.tokens, 1):.2f} bytes a token"
        )
    if left_out := [f"{name} {count}" for name, count in manifest.filters.items() if count]:
        print(f"dropped: {', '.join(left_out)}")
    gc.freeze()  # saves 0.1 s at exit: no garbage collection
    return 0
