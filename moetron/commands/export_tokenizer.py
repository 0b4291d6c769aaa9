"""Write a tokenizer as a folder that HuggingFace's AutoTokenizer loads; compare the ids.

    python tools/export_tokenizer.py umt5.model --output FOLDER [--sample corpus/*.jsonl]

Exit codes: 0 done, 2 an error to fix, or different ids on a text.
"""

import argparse
import sys
from pathlib import Path

from moetron.data.corpora.labels import labelled_texts
from moetron.data.readers.first_rows import require_texts
from moetron.data.readers.input_files import find_files
from moetron.moe.config.schema.paths import ToolParser
from moetron.tokenizers.export import PROBES, different_texts, export, has_transformers
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("tokenizer", metavar="PATH", help="a .model, a tokenizer.json (or its folder), or bytes")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where to write")
    add("--sample", nargs="+", metavar="PATH", help="more text to compare on")
    add("--text-key", default="text", help="key of the text in a row (default: text)")
    return parser


def compare(tokenizer: Tokenizer, arguments: argparse.Namespace) -> bool:
    """Compare with AutoTokenizer's ids and print the result; return whether all are equal.

    The texts are a few probes of known differences, and the documents of --sample.
    """
    texts = list(PROBES)
    if arguments.sample:
        found = labelled_texts(find_files(arguments.sample), arguments.text_key)
        texts += [text for _, text in found]
    different = different_texts(tokenizer, arguments.output, texts)
    size = sum(len(text.encode()) for text in texts)
    equal = len(texts) - len(different)
    print(f"equal ids on {equal:,} of {len(texts):,} documents, {size:,} bytes")
    for text in different[:3]:
        print(f"different ids: {text[:80]!r}")
    return not different


def main() -> int:
    """Export and compare; return the exit code."""
    arguments = parser().parse_args()
    try:
        if arguments.sample:
            require_texts(find_files(arguments.sample), arguments.text_key, max_bad_fraction=1.0)
        tokenizer = load_tokenizer(arguments.tokenizer)
        export(tokenizer, arguments.output)
        if not arguments.sample and not has_transformers():
            print("not compared with AutoTokenizer: pip install moetron[hf]", file=sys.stderr)
            return 0
        return 0 if compare(tokenizer, arguments) else 2
    except (ValueError, OSError, ImportError) as error:
        print(f"export_tokenizer: {error}", file=sys.stderr)
        return 2
