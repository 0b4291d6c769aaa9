"""Continue prompts, or answer questions, with a trained model, on one rank.

    python tools/generate.py --load RUN --prompt "def main(" --max-new-tokens 100
    python tools/generate.py --load RUN --prompts-file FILE        # one prompt a line
    python tools/generate.py --load RUN --input prompts.jsonl --output answers.jsonl --num-samples 4
    python tools/generate.py --load RUN --chat                     # or --chat --prompt "Why?"
    python tools/generate.py --load RUN --mode nlu --prompt "for <extra_id_0> in range(3):"

--input: a JSON object a line, with `prompt` (text to continue) or `messages` (a conversation to
answer). Output: for each row and sample, in order, `row` (from 0), `sample`, `id` if the row has
one, `text`, `prompt_tokens`, `tokens`, `finish_reason` (eos, stop or length) and `log_probability`
(nats, of all tokens, under the model without temperature and penalty).

--chat reads questions from --prompt (one conversation) or line by line from standard input, and
answers in the template that the run was fine-tuned with; /reset begins a new conversation.

Experts have no capacity limit: no token is dropped, and no row of a batch changes another.
Attention over the prompt is bidirectional if the model was trained so (--bidirectional-prefix with
--mode, or with objective prefix_lm or ul2). Exit codes: 0 done, 2 user error, 1 internal error.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moetron.answers import Answer, Writer, converse
from moetron.common import threads
from moetron.common.errors import UserError
from moetron.common.files import write_text
from moetron.data.chat.conversation import Conversation
from moetron.data.chat.encode_chat import encode_question
from moetron.data.chat.prompt_rows import PromptRow, read_prompt_rows
from moetron.data.chat.run_template import run_template, turn_ends
from moetron.data.chat.templates import Template
from moetron.data.objectives.prompts import HOLE, Mode, filled, prompt_ids
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.compatibility import tokenizer_fingerprints
from moetron.moe.checkpoint.vocabulary import vocabulary_of
from moetron.moe.config.schema.derived import reads_prefix
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.config.schema.settings import Settings
from moetron.moe.inference.sampling import Sampling
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.tokenizers.decoded_text import ends_of
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.run_copy import load_run_tokenizer

if TYPE_CHECKING:  # torch: seconds
    from moetron.moe.inference.batch_generation import Request


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="a run or a step_* folder")
    add("--prompt", type=str, action="append", help="text to continue, or a question; repeatable")
    add("--prompts-file", type=Path, metavar="FILE", help="more prompts, one per line")
    add("--input", type=Path, metavar="FILE", help="prompts in JSON Lines")
    add("--output", type=Path, metavar="FILE", help="answers in JSON Lines (default: print them)")
    add("--mode", choices=get_args(Mode), default="causal", help="UL2's modes: s2s, nlu, nlg")
    add("--max-new-tokens", type=int, default=100, help="limit (default: 100)")
    add("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8)")
    add("--top-k", type=int, default=0, help="sample from the best N tokens; 0: all (default)")
    add("--top-p", type=float, default=0.95, help="nucleus probability (default: 0.95)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: less of it (default: 1)")
    add("--stop", type=str, action="append", metavar="TEXT", help="ends an answer; repeatable")
    add("--num-samples", type=int, default=1, help="answers per prompt (default: 1)")
    add("--batch-size", type=int, default=8, help="rows of a forward pass (default: 8)")
    add("--seed", type=int, default=0, help="of each first sample; the next has S + 1 (default: 0)")
    add("--no-cache", action="store_true", help="recompute the full sequence for every token")
    add("--chat", action="store_true", help="answer questions in the run's chat template")
    add("--template", help="olmoe, a Jinja file or a folder (default: the run's)")
    add("--end-of-turn", type=str, metavar="TEXT", help="token that ends an answer of --template")
    add("--system", type=str, metavar="TEXT", help="system message of a chat")
    add("--tokenizer-model", metavar="PATH", help="tokenizer (default: the copy in the run folder)")
    return threads.add_option(parser)


def check(arguments: argparse.Namespace) -> None:
    """Raise UserError with all arguments that are invalid or do not go together."""
    given = arguments
    texts = given.prompt is not None or given.prompts_file is not None
    several = given.input is not None or given.prompts_file is not None or given.num_samples != 1
    rules = [
        (f"--{name.replace('_', '-')} {value}: must be at least 1", value >= 1)
        for name in ("max_new_tokens", "num_samples", "batch_size")
        for value in [getattr(given, name)]
    ]
    rules += [
        ("--stop '': must not be empty", "" not in (given.stop or [])),
        (
            "--stop: not for holes (--mode nlu, nlg)",
            not given.stop or given.mode in ("causal", "s2s"),
        ),
        ("--input: give no --prompt and no --prompts-file", not (given.input and texts)),
        (
            "--output: is for --input; redirect standard output instead",
            not given.output or given.input,
        ),
        (
            "--chat: one conversation; give no --input, --prompts-file, --num-samples or --mode",
            not given.chat or not (several or given.mode != "causal"),
        ),
        ("--system: is for --chat", given.system is None or given.chat),
        ("--template: is for --chat and --input", not given.template or given.chat or given.input),
        ("--end-of-turn: needs --template", given.end_of_turn is None or given.template),
    ]
    problems = [problem for problem, holds in rules if not holds]
    if given.output is not None and not given.output.parent.is_dir():
        problems.append(f"--output {given.output}: no folder {given.output.parent}")
    if problems:
        raise UserError("\n".join(problems))


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Return all prompts, or one empty prompt if none is given."""
    prompts = list(arguments.prompt or [])
    if arguments.prompts_file is not None:
        try:
            prompts += arguments.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts-file {arguments.prompts_file}: {error}") from error
    return prompts or [""]


class _Texts:
    """Prompts of the command line, printed with what follows them."""

    def __init__(self, arguments: argparse.Namespace, tokenizer: Tokenizer) -> None:
        self._texts, self._tokenizer = read_prompts(arguments), tokenizer
        self._samples = arguments.num_samples
        self.ids = [prompt_ids(text, arguments.mode, tokenizer) for text in self._texts]

    def run(self, writer: Writer, requests: Sequence["Request"]) -> int:
        """Print all answers in order; return the number of tokens."""
        count = 0
        for start in range(0, len(requests), writer.batch_size):
            part = requests[start : start + writer.batch_size]
            prompts = [self._texts[(start + n) // self._samples] for n in range(len(part))]
            streamed = len(part) == 1 and not HOLE.search(prompts[0])
            if streamed:
                print(prompts[0], end="", flush=True)
            show = (lambda text: print(text, end="", flush=True)) if streamed else None
            for number, answer in sorted(writer.answers(part, show), key=lambda pair: pair[0]):
                count += len(answer.generated.tokens)
                print("" if streamed else self._whole(prompts[number], answer))
        return count

    def _whole(self, prompt: str, answer: Answer) -> str:
        if HOLE.search(prompt):
            return filled(prompt, answer.ids, self._tokenizer)
        return prompt + answer.text


class _Rows:
    """Rows of --input, answered in --output."""

    def __init__(
        self, arguments: argparse.Namespace, tokenizer: Tokenizer, template: Template | None
    ) -> None:
        def encode_text(text: str) -> list[int]:
            return prompt_ids(text, arguments.mode, tokenizer)

        def encode_chat(messages: Sequence[Any]) -> list[int]:
            assert template is not None
            return encode_question(messages, template, tokenizer)

        self._output, self._samples = arguments.output, arguments.num_samples
        self._rows: list[PromptRow] = read_prompt_rows(
            arguments.input, encode_text, None if template is None else encode_chat
        )
        self.ids = [row.ids for row in self._rows]

    def run(self, writer: Writer, requests: Sequence["Request"]) -> int:
        """Write all answers in order when the last one is done; return the number of tokens."""
        found = sorted(writer.answers(requests), key=lambda pair: pair[0])
        lines = [json.dumps(self._answer(number, answer)) + "\n" for number, answer in found]
        if self._output is None:
            print("".join(lines), end="")
        else:
            write_text(self._output, "".join(lines))
        return sum(len(answer.generated.tokens) for _, answer in found)

    def _answer(self, number: int, answer: Answer) -> dict[str, Any]:
        row, sample = divmod(number, self._samples)
        given, generated = self._rows[row].given, answer.generated
        return {
            "row": row,
            "sample": sample,
            **({"id": given["id"]} if "id" in given else {}),
            "text": answer.text,
            "prompt_tokens": len(self._rows[row].ids),
            "tokens": len(generated.tokens),
            "finish_reason": generated.finish_reason,
            "log_probability": generated.log_probability,
        }


class _Chat:
    """Questions of --prompt or standard input."""

    ids: Sequence[list[int]] = ()

    def __init__(
        self,
        arguments: argparse.Namespace,
        tokenizer: Tokenizer,
        template: Template,
        seq_length: int,
    ) -> None:
        room = seq_length - min(arguments.max_new_tokens, seq_length // 2)
        self._conversation = Conversation(template, tokenizer, room, arguments.system)
        self._typed = arguments.prompt is None and sys.stdin.isatty()
        self._questions = arguments.prompt

    def run(self, writer: Writer, _: Sequence["Request"]) -> int:
        """Answer until the questions end; return the number of tokens."""
        questions = sys.stdin if self._questions is None else self._questions
        asked = _typed() if self._typed else questions
        return converse(writer, self._conversation, asked, sys.stdout, echo=not self._typed)


def _typed() -> Iterator[str]:
    """Yield lines typed at a terminal, with a prompt and a history; Ctrl-D ends."""
    import readline  # noqa: F401 - gives input() its editing

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _sampling(arguments: argparse.Namespace) -> Sampling:
    return Sampling(
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.seed,
        arguments.repetition_penalty,
    )


def _work(
    arguments: argparse.Namespace,
    tokenizer: Tokenizer,
    template: Template | None,
    seq_length: int,
) -> _Texts | _Rows | _Chat:
    """Read what is to be answered; raise UserError if it cannot be."""
    if arguments.input:
        return _Rows(arguments, tokenizer, template)
    if not arguments.chat:
        return _Texts(arguments, tokenizer)
    if template is None:
        raise UserError("--chat: the run was not fine-tuned on chats; give --template")
    return _Chat(arguments, tokenizer, template, seq_length)


def _say_what_differs(settings: Settings) -> None:
    """Print on standard error where answers cannot be those of training."""
    factor = settings.moe.moe_expert_capacity_factor
    if factor is not None:
        print(
            f"no choice of an expert is dropped here; training had --moe-expert-capacity-factor "
            f"{factor:g}",
            file=sys.stderr,
        )
    if settings.precision.fp8_format is not None:
        print(
            "--fp8-format: rows of a batch share scales; --batch-size 1 keeps them apart",
            file=sys.stderr,
        )


def main() -> int:
    """Continue the prompts of the command line; return the exit code."""
    arguments = parser().parse_args()
    sampling = _sampling(arguments)
    check(arguments)
    quieten_libraries()
    record = checkpoint_folder.read(arguments.load).record
    settings = checkpoint_folder.one_rank_settings(record, arguments.cpu_threads)
    known = tokenizer_fingerprints(record.stream)
    tokenizer = load_run_tokenizer(
        arguments.load, arguments.tokenizer_model, settings.data.tokenizer_model, known
    )
    ends, template = ends_of(arguments.stop or [], tokenizer), None
    if arguments.chat or arguments.input:
        given = arguments.template, arguments.end_of_turn
        template = run_template(record.stream, tokenizer, *given)
        ends = ends if template is None else ends | turn_ends(template, tokenizer)
    work = _work(arguments, tokenizer, template, settings.model.seq_length)
    vocab_size = vocabulary_of(arguments.load, settings, tokenizer.vocab_size)
    both_ways = reads_prefix(settings, record.progress.consumed_samples, arguments.mode != "causal")
    _say_what_differs(settings)
    from moetron.moe.inference.batch_generation import Request  # torch: seconds, after the checks
    from moetron.moe.inference.generation import load_model
    from moetron.moe.training import runtime

    limits = arguments.max_new_tokens, arguments.batch_size, not arguments.no_cache
    with runtime.running(settings) as ranks:
        model = load_model(arguments.load, settings, vocab_size, ranks)
        requests = [
            Request(ids, sampling.seed + sample, both_ways)
            for ids in work.ids
            for sample in range(arguments.num_samples)
        ]
        started = time.perf_counter()
        count = work.run(Writer(model, tokenizer, sampling, ends, *limits), requests)
        seconds = time.perf_counter() - started
    print(f"{count} tokens, {count / seconds:,.1f} tokens/s", file=sys.stderr)
    return 0
