"""Text of tokens as they arrive, up to a stop string or an end token."""

from collections.abc import Sequence
from dataclasses import dataclass

from moetron.tokenizers.interface import Tokenizer


@dataclass(frozen=True)
class Ends:
    """What ends a text."""

    ids: frozenset[int]
    """Tokens: the end of a document, and special ones."""
    texts: tuple[str, ...] = ()
    """Stop strings."""

    def __or__(self, other: "Ends") -> "Ends":
        """Return the ends of both."""
        return Ends(self.ids | other.ids, self.texts + other.texts)


def ends_of(stops: Sequence[str], tokenizer: Tokenizer) -> Ends:
    """Return the ends for stop strings; the spelling of a special token stands for the token.

    The end of a document is always one. Decoded text does not show special tokens.
    """
    ids, texts = {tokenizer.eod}, []
    for stop in stops:
        number = tokenizer.id_of(stop) if stop in tokenizer.special_texts else None
        if stop != tokenizer.end_text and number is None:
            texts.append(stop)
        elif number is not None:
            ids.add(number)
    return Ends(frozenset(ids), tuple(texts))


class DecodedText:
    """Text of a growing sequence of tokens, cut before the first of some stop strings.

    A stop string is found wherever tokens begin and end in it. All tokens are decoded together,
    because characters and spaces may depend on the tokens before.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, list(stops)
        self._ids: list[int] = []
        self._text: str | None = ""
        self._shown = 0
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, token: int) -> None:
        """Append a token."""
        self._ids.append(token)
        self._text = None
        places = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if places:
            self._text, self.stopped = self.text[: min(places)], True

    @property
    def text(self) -> str:
        """Return the text so far."""
        if self._text is None:
            self._text = self._tokenizer.decode(self._ids)
        return self._text

    def settled(self) -> str:
        """Return the next part of the text that later tokens cannot change or cut."""
        if self.text.endswith("\ufffd"):  # may be an incomplete character
            return ""
        return self._next(len(self.text) - self._begun())

    def rest(self) -> str:
        """Return what `settled` has not returned."""
        return self._next(len(self.text))

    def _next(self, end: int) -> str:
        part = self.text[self._shown : end]
        self._shown = max(end, self._shown)
        return part

    def _begun(self) -> int:
        """Return the length of the longest end of the text that a stop string begins with."""
        if self.stopped:
            return 0
        longest = max(map(len, self._stops), default=1) - 1
        ends = (self.text[-size:] for size in range(min(longest, len(self.text)), 0, -1))
        return next((len(e) for e in ends if any(s.startswith(e) for s in self._stops)), 0)
