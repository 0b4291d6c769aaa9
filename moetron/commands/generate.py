"""Continue prompts with a trained model, on one rank; text is printed as it is generated.

    python tools/generate.py --load RUN --prompt "def main(" --max-new-tokens 100
    python tools/generate.py --load RUN --prompts-file FILE        # one prompt a line
    python tools/generate.py --load RUN --mode nlu --prompt "for <extra_id_0> in range(3):"

Experts have no capacity limit: no token is dropped. Attention over the prompt is bidirectional if
the model was trained so (--bidirectional-prefix with --mode, or with objective prefix_lm or ul2).
Exit codes: 0 done, 2 user error, 1 internal error.
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
    """Return the argument parser."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="a run or a step_* folder")
    add("--prompt", type=str, action="append", help="text to continue; repeatable")
    add("--prompts-file", type=Path, metavar="FILE", help="more prompts, one per line")
    add("--mode", choices=get_args(Mode), default="causal", help="UL2's modes: s2s, nlu, nlg")
    add("--max-new-tokens", type=int, default=100, help="limit (default: 100)")
    add("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8)")
    add("--top-k", type=int, default=0, help="sample from the best N tokens; 0: all (default)")
    add("--top-p", type=float, default=0.95, help="nucleus probability (default: 0.95)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add("--no-cache", action="store_true", help="recompute the full sequence for every token")
    add("--tokenizer-model", metavar="PATH", help="tokenizer (default: the copy in the run folder)")
    return threads.add_option(parser)


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Return all prompts, or one empty prompt if none is given."""
    prompts = list(arguments.prompt or [])
    if arguments.prompts_file is not None:
        try:
            prompts += arguments.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts-file {arguments.prompts_file}: {error}") from error
    return prompts or [""]


def show(prompt: str, following: Iterator[int], tokenizer: Tokenizer) -> int:
    """Print a prompt and its continuation as it is decoded; return the number of new tokens."""
    if HOLE.search(prompt):
        new = list(following)
        print(filled(prompt, new, tokenizer))
        return len(new)
    print(prompt, end="", flush=True)
    new, shown = [], ""
    for token in following:
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # may be an incomplete character
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(new)[len(shown) :])
    return len(new)


def main() -> int:
    """Continue the prompts of the command line; return the exit code."""
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
