"""Continue prompts with a trained model, on one rank; text appears as it is made.

    python tools/generate.py --load RUN --prompt "def main(" --max-new-tokens 100
    python tools/generate.py --load RUN --prompts-file FILE        # one prompt a line
    python tools/generate.py --load RUN --mode nlu --prompt "for <extra_id_0> in range(3):"

Experts have no capacity: each token is served by the experts that it chooses. A prompt sees all of
itself where --bidirectional-prefix let the given part of samples do so (--mode, or objective
prefix_lm or ul2). Exit codes: 0 done, 2 something for the user to change, 1 our fault.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from moetron.common import threads
from moetron.common.errors import UserError
from moetron.data.objectives.prompts import HOLE, Mode, filled, prompt_ids
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.compatibility import tokenizer_fingerprints
from moetron.moe.checkpoint.vocabulary import vocabulary_of
from moetron.moe.config.schema.derived import reads_prefix
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.inference.sampling import Sampling
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.run_copy import load_run_tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="a run or a step_* folder of it")
    add("--prompt", type=str, action="append", help="text to continue; may be given again")
    add("--prompts-file", type=Path, metavar="FILE", help="more prompts, one a line")
    add("--mode", choices=get_args(Mode), default="causal", help="UL2's modes: s2s, nlu, nlg")
    add("--max-new-tokens", type=int, default=100, help="stop after so many (default: 100)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest (default: 0.8)")
    add("--top-k", type=int, default=0, help="choose among so many tokens; 0: all (default)")
    add("--top-p", type=float, default=0.95, help="share of probability to choose from")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--no-cache", action="store_true", help="compute the whole sequence for every token")
    add("--tokenizer-model", metavar="PATH", help="default: the copy in the run's folder")
    return threads.add_option(parser)


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """All prompts; an empty one where none is given."""
    prompts = list(arguments.prompt or [])
    if arguments.prompts_file is not None:
        try:
            prompts += arguments.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts-file {arguments.prompts_file}: {error}") from error
    return prompts or [""]


def show(prompt: str, following: Iterator[int], tokenizer: Tokenizer) -> int:
    """Print a prompt and what follows, as far as it is certain; returns the number of tokens."""
    if HOLE.search(prompt):
        new = list(following)
        print(filled(prompt, new, tokenizer))
        return len(new)
    print(prompt, end="", flush=True)
    new, shown = [], ""
    for token in following:
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # perhaps the first bytes of a character
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(new)[len(shown) :])
    return len(new)


def main() -> int:
    """Generate what the command line asks for; the exit code."""
    arguments = parser().parse_args()
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: must be at least 1")
    quieten_libraries()
    record = checkpoint_folder.read(arguments.load).record
    settings = checkpoint_folder.one_rank_settings(record, arguments.cpu_threads)
    known = tokenizer_fingerprints(record.stream)
    tokenizer = load_run_tokenizer(
        arguments.load, arguments.tokenizer_model, settings.data.tokenizer_model, known
    )
    texts = read_prompts(arguments)
    prompts = [prompt_ids(text, arguments.mode, tokenizer) for text in texts]
    vocab_size = vocabulary_of(arguments.load, settings, tokenizer.vocab_size)
    both_ways = reads_prefix(settings, record.progress.consumed_samples, arguments.mode != "causal")
    from moetron.moe.inference import generation as generate  # torch: seconds, after the checks
    from moetron.moe.training import runtime  # torch: seconds, after the checks

    with runtime.running(settings) as ranks:
        model = generate.load_model(arguments.load, settings, vocab_size, ranks)
        started, count = time.perf_counter(), 0
        for text, prompt in zip(texts, prompts, strict=True):
            rule = (tokenizer.vocab_size, sampling, not arguments.no_cache, both_ways)
            following = generate.continuation(model, prompt, *rule)
            document = itertools.takewhile(lambda token: token != tokenizer.eod, following)
            count += show(text, itertools.islice(document, arguments.max_new_tokens), tokenizer)
        seconds = time.perf_counter() - started
    print(f"{count} tokens, {count / seconds:,.1f} tokens/s", file=sys.stderr)
    return 0
