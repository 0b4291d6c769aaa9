"""Turn chats, prompts with completions, or preferences into shards for fine-tuning.

    python tools/prepare_chats.py --input chats.jsonl --tokenizer TOKENIZER --output-prefix data/sft
    python tools/prepare_chats.py --input pairs.jsonl --kind pairs --tokenizer T --output-prefix P

Rows are JSONL (.gz, .zst). chats: `messages`, or `prompt` and `completion`; pairs: `chosen` and
`rejected`, conversations or answers to `prompt`; labelled: as chats, with a boolean `label`, or as
pairs. A row whose answers have no sure place in the rendered text is dropped, and counted by
reason. The first conversation is printed with its trained tokens marked: look at it. Exit codes: 0
done, 2 user error.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from moetron.common.errors import UserError
from moetron.data.chat.chat_rows import Kind
from moetron.data.chat.encode_chat import MaskRule
from moetron.data.chat.templates import read_template
from moetron.data.chat.write_chats import (
    TRUNCATED,
    ChatOptions,
    Encoded,
    read_json_rows,
    write_chats,
)
from moetron.data.readers.input_files import find_files
from moetron.moe.config.schema.paths import ToolParser
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer

SHOWN = 60
"""Tokens of the first conversation that are printed, from the first trained one's context on."""


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSONL files")
    add("--kind", choices=get_args(Kind), default="chats", help="form of the rows (default: chats)")
    add("--tokenizer", required=True, metavar="PATH", help="a .model, tokenizer.json, or bytes")
    add(
        "--template",
        default="olmoe",
        help="olmoe, a Jinja file, or a folder with a HuggingFace chat template (default: olmoe)",
    )
    add("--end-of-turn", metavar="TEXT", help="token that ends an answer (default: the eos token)")
    add(
        "--mask",
        choices=get_args(MaskRule),
        default="correct",
        help="as_released: with OLMoE's loss on the newline before an answer (default: correct)",
    )
    add("--max-length", type=int, default=4096, help="tokens; longer ones are cut (default: 4096)")
    add("--output-prefix", type=Path, required=True, metavar="PREFIX", help="of the shard")
    add("--holdout-fraction", type=float, default=0.0, help="fraction to hold out (default: 0)")
    add("--holdout-prefix", type=Path, metavar="PREFIX", help="of the shard that is held out")
    return parser


def marked(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """Return the start of a conversation, its trained tokens in [[ ]]."""
    first = max(int(encoded.mask.argmax()) - SHOWN // 2, 0)
    shown, inside = "", False
    for number, trained in zip(
        encoded.ids[first : first + SHOWN].tolist(), encoded.mask[first:].tolist(), strict=False
    ):
        if trained != inside:
            shown, inside = shown + ("[[" if trained else "]]"), trained
        end = number == tokenizer.eod
        shown += tokenizer.end_text if end else tokenizer.decode([number])
    return shown + ("]]" if inside else "")


def main() -> int:
    """Prepare the chats of the command line; return the exit code."""
    arguments = parser().parse_args()
    if (arguments.holdout_fraction > 0) != (arguments.holdout_prefix is not None):
        raise UserError("--holdout-fraction and --holdout-prefix need each other")
    if arguments.max_length < 2:
        raise UserError(f"--max-length {arguments.max_length}: must be at least 2")
    if arguments.mask == "as_released" and arguments.template != "olmoe":
        raise UserError("--mask as_released: only OLMoE's own run had it; use --template olmoe")
    tokenizer = load_tokenizer(arguments.tokenizer)
    template = read_template(arguments.template, tokenizer.end_text, arguments.end_of_turn)
    options = ChatOptions(
        arguments.kind, arguments.mask, arguments.max_length, arguments.holdout_fraction
    )
    rows = read_json_rows(find_files(arguments.input))
    outcome = write_chats(
        rows, template, tokenizer, options, arguments.output_prefix, arguments.holdout_prefix
    )
    counts = outcome.counts
    print(f"{counts['used']} of {counts['rows']} rows used, {counts[TRUNCATED]} cut")
    dropped = {n: c for n, c in counts.items() if n not in ("rows", "used", TRUNCATED)}
    for reason, count in sorted(dropped.items()):
        print(f"dropped: {count} x {reason}")
    for prefix, manifest in outcome.manifests.items():
        print(f"{prefix}: {manifest.documents} conversations, {manifest.tokens} tokens")
    assert outcome.first is not None
    print(f"trained tokens in [[ ]]: {marked(outcome.first, tokenizer)!r}", file=sys.stderr)
    return 0
