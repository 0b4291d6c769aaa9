#!/usr/bin/env python
"""Write a tokenizer as a folder that HuggingFace's AutoTokenizer loads; compare the ids on a text.

    python tools/export_tokenizer.py umt5.model --output FOLDER [--sample corpus/*.jsonl]

Exit codes: 0 done, 2 something to mend, or other ids on a document of the sample.
"""

import argparse
import sys
from pathlib import Path

from moetron.data.corpora.labels import labelled_texts
from moetron.data.readers.first_rows import require_texts
from moetron.data.readers.input_files import find_files
from moetron.moe.config.paths import ToolParser
from moetron.tokenizers.export import export
from moetron.tokenizers.load import load_tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("tokenizer", metavar="PATH", help="a SentencePiece .model or a HuggingFace tokenizer.json")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where to write")
    add("--sample", nargs="+", metavar="PATH", help="text to compare on (needs transformers)")
    add("--text-key", default="text", help="key of the text in a row (default: text)")
    return parser


def compare(arguments: argparse.Namespace) -> bool:
    """Print on how many documents of the sample AutoTokenizer gives our ids; whether on all."""
    from transformers import AutoTokenizer  # seconds

    ours, theirs = (
        load_tokenizer(arguments.tokenizer),
        AutoTokenizer.from_pretrained(arguments.output),
    )
    documents = equal = size = 0
    for _, text in labelled_texts(find_files(arguments.sample), arguments.text_key):
        documents, size = documents + 1, size + len(text.encode())
        equal += theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    print(f"equal ids on {equal:,} of {documents:,} documents, {size:,} bytes")
    return equal == documents


def main() -> int:
    """Export, compare; the exit code."""
    arguments = parser().parse_args()
    try:
        if arguments.sample:
            require_texts(find_files(arguments.sample), arguments.text_key, max_bad_fraction=1.0)
        export(load_tokenizer(arguments.tokenizer), arguments.output)
        return 0 if not arguments.sample or compare(arguments) else 2
    except (ValueError, OSError, ImportError) as error:
        print(f"export_tokenizer: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
