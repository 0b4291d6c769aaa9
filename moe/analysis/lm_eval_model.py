"""Our model behind the interface of lm-evaluation-harness (``lm_eval``, extra ``eval``)."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moetron.moe.inference.generation import continuation
from moetron.moe.inference.sampling import Sampling
from moetron.moe.inference.scoring import score
from moetron.moe.layers.language_model import LanguageModel

MAX_NEW_TOKENS = 256
"""Default of ``max_gen_toks``, as in the harness's own models."""


class Text(Protocol):
    """Tokenizer interface."""

    eod: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        ...


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Harness model on one rank.

    A text without context is preceded by an end of document, as in training.

    Args:
        model: on one rank, in evaluation mode.
        text: tokenizer of the run.
        batch_size: sequences per forward pass.
        reads_prefix: use bidirectional attention over the context, as in training.
    """

    def __init__(
        self, model: LanguageModel, text: Text, batch_size: int, reads_prefix: bool = False
    ) -> None:
        super().__init__()
        self._reads_prefix = reads_prefix
        self._model = model
        self._text = text
        self._batch_size = batch_size
        self._length: int = model.max_sequence_length

    @property
    def eot_token_id(self) -> int:
        """Return the end-of-document id, which also precedes each document."""
        return self._text.eod

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, without special ones."""
        return self._text.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = score(self._model, pairs, self._batch_size, self._reads_prefix)
        return [(one.log_likelihood, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of full texts, in windows of the model's length."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self._text.encode(request.args[0]), self.prefix_token_id, self._length, 1
            )
            pairs = [make_disjoint_window(window) for window in windows]
            found = score(self._model, pairs, self._batch_size, self._reads_prefix)
            totals.append(sum(one.log_likelihood for one in found))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return continuations of contexts, up to an end of document or a stop word."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        sampling = Sampling(
            temperature, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0)
        )
        prompt = self._text.encode(context)[-max(self._length - limit, 1) :] or [self._text.eod]
        following = continuation(
            self._model,
            prompt,
            self._text.vocab_size,
            sampling,
            reads_prefix=self._reads_prefix,
        )
        new: list[int] = []
        text = ""
        for token in islice(following, limit):
            if token == self._text.eod:
                break
            new.append(token)
            text = self._text.decode(new)
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text
