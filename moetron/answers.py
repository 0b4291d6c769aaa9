"""Answers of a model as text: batches of prompts, streamed text, a conversation on a terminal."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from moetron.data.chat.conversation import Conversation
from moetron.data.chat.templates import Undecidable
from moetron.moe.inference.sampling import Sampling
from moetron.tokenizers.decoded_text import DecodedText, Ends
from moetron.tokenizers.interface import Tokenizer

if TYPE_CHECKING:  # torch: seconds
    from moetron.moe.inference.batch_generation import Generated, Request
    from moetron.moe.layers.language_model import LanguageModel

EOS, STOP = "eos", "stop"
"""Finish reasons: an end token, a stop string."""
RESTART = "/reset"
"""Line that begins a new conversation."""


@dataclass(frozen=True)
class Answer:
    """Text that follows a prompt."""

    text: str
    """Without end token, and up to a stop string."""
    generated: "Generated"

    @property
    def ids(self) -> list[int]:
        """Return the tokens without the end token."""
        tokens = self.generated.tokens
        return tokens[:-1] if self.generated.finish_reason == EOS else tokens


@dataclass(frozen=True)
class Writer:
    """A model, and how it answers."""

    model: "LanguageModel"
    tokenizer: Tokenizer
    sampling: Sampling
    ends: Ends
    max_new_tokens: int
    batch_size: int = 1
    """Rows of a forward pass."""
    cached: bool = True

    def answers(
        self, requests: Sequence["Request"], show: Callable[[str], None] | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the number of each request and its answer, batch by batch.

        Requests of similar length share a batch, those that attention cannot pad only with equal
        ones. ``show`` gets the text of a batch of one as it is generated.
        """
        from moetron.moe.inference.growing_batch import takes_padding

        pads = takes_padding(self.model)
        longest_first = sorted(range(len(requests)), key=lambda n: -len(requests[n].ids))
        batch: list[int] = []
        for number in longest_first:
            fits = not batch or pads or len(requests[batch[0]].ids) == len(requests[number].ids)
            if len(batch) == self.batch_size or not fits:
                yield from self._batch(batch, requests, show)
                batch = []
            batch.append(number)
        if batch:
            yield from self._batch(batch, requests, show)

    def _batch(
        self, numbers: list[int], requests: Sequence["Request"], show: Callable[[str], None] | None
    ) -> Iterator[tuple[int, Answer]]:
        from moetron.moe.inference.batch_generation import generate_batch

        texts = [DecodedText(self.tokenizer, self.ends.texts) for _ in numbers]
        show = show if len(numbers) == 1 else None

        def finish(row: int, token: int) -> str | None:
            if token in self.ends.ids:
                return EOS
            texts[row].add(token)
            if show is not None:
                show(texts[row].settled())
            return STOP if texts[row].stopped else None

        found = generate_batch(
            self.model,
            [requests[number] for number in numbers],
            self.tokenizer.vocab_size,
            self.sampling,
            self.max_new_tokens,
            finish,
            self.cached,
        )
        if show is not None:
            show(texts[0].rest())
        for number, text, generated in zip(numbers, texts, found, strict=True):
            yield number, Answer(text.text, generated)


def converse(
    writer: Writer, conversation: Conversation, questions: Iterable[str], output: TextIO, echo: bool
) -> int:
    """Answer one question after the other; return the number of tokens.

    Args:
        writer: its ends contain the template's.
        conversation: without turns.
        questions: lines; empty ones are left out, `RESTART` begins a new conversation.
        output: gets the answers as they are generated.
        echo: whether to print questions too, since nobody typed them here.
    """
    from moetron.moe.inference.batch_generation import LENGTH, Request

    count = 0

    def show(text: str) -> None:
        print(text, end="", file=output, flush=True)

    for line in questions:
        question = line.rstrip("\r\n")
        if not question.strip():
            continue
        if echo:
            print(f"> {question}", file=output)
        if question.strip() == RESTART:
            conversation.restart()
            continue
        try:
            ids = conversation.ask(question)
        except Undecidable as error:
            print(f"not asked: {error}", file=sys.stderr)
            continue
        request = Request(ids, writer.sampling.seed)
        [(_, answer)] = writer.answers([request], show)
        print(file=output, flush=True)
        conversation.answered(answer.text)
        count += len(answer.generated.tokens)
        if answer.generated.finish_reason == LENGTH:
            print(f"[cut after {writer.max_new_tokens} tokens]", file=sys.stderr)
    return count
