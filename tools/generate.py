#!/usr/bin/env python
"""Continue a prompt with a trained model, on one rank.

    python tools/generate.py --load RUN --prompt "def main(" --max-new-tokens 100

RUN is a run's folder (its latest checkpoint) or one step_* folder, written in any layout. Exit
codes: 0 done, 2 something for the user to change, 1 our fault.
"""

import argparse
import itertools
import sys
from pathlib import Path

from moetron.moe.config.errors import UserError
from moetron.moe.training import checkpoint_folder
from moetron.moe.training.quiet import quieten_libraries
from moetron.tokenizers.interface import Tokenizer, TokenizerError
from moetron.tokenizers.load import load_tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="where the checkpoint lies")
    add("--prompt", default="", help="text to continue (default: the start of a document)")
    add("--max-new-tokens", type=int, default=100, help="stop after so many (default: 100)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest (default: 0.8)")
    add("--top-k", type=int, default=0, help="choose among so many tokens; 0: all (default)")
    add("--top-p", type=float, default=0.95, help="share of probability to choose from")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--tokenizer-model", metavar="PATH", help="where the run's tokenizer lies now, if moved")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse values that mean nothing, all at once."""
    problems = [
        f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be {rule}"
        for name, rule, holds in (
            ("max_new_tokens", "at least 1", arguments.max_new_tokens >= 1),
            ("temperature", "at least 0", arguments.temperature >= 0),
            ("top_k", "at least 0", arguments.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < arguments.top_p <= 1),
        )
        if not holds
    ]
    if problems:
        raise UserError("\n".join(problems))


def open_tokenizer(path: str | None, expected: set[str]) -> Tokenizer:
    """The run's tokenizer; ``expected`` holds the fingerprints of its training shards."""
    if path is None:
        raise UserError("the run names no tokenizer (mock data?): give --tokenizer-model")
    try:
        tokenizer = load_tokenizer(path)
    except TokenizerError as error:
        raise UserError(f"{error}; if it moved, give --tokenizer-model") from error
    if expected and tokenizer.fingerprint not in expected:
        raise UserError(
            f"--tokenizer-model {path}: not the tokenizer that the run was trained with"
        )
    return tokenizer


def main() -> int:
    """Generate what the command line asks for; the exit code."""
    arguments = parser().parse_args()
    check(arguments)
    quieten_libraries()
    record = checkpoint_folder.read(arguments.load).record
    settings = checkpoint_folder.one_rank_settings(record)
    trained_with = {source.get("tokenizer") for source in record.stream.get("sources", [])}
    tokenizer = open_tokenizer(
        arguments.tokenizer_model or settings.data.tokenizer_model, trained_with - {None}
    )
    vocab_size = settings.model.vocab_size or tokenizer.vocab_size
    prompt = tokenizer.encode(arguments.prompt) or [tokenizer.eod]
    from moetron.moe.training import generate, runtime  # torch: seconds, after the checks

    with runtime.running(settings) as ranks:
        model = generate.load_model(arguments.load, settings, vocab_size, ranks)
        following = generate.continuation(
            model,
            prompt,
            min(vocab_size, tokenizer.vocab_size),
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
        document = itertools.takewhile(lambda token: token != tokenizer.eod, following)
        new = list(itertools.islice(document, arguments.max_new_tokens))
    print(arguments.prompt + tokenizer.decode(new))
    return 0


if __name__ == "__main__":
    from moetron.moe.training.resilience import run_guarded

    sys.exit(run_guarded(main))
