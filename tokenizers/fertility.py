"""Fertility of a tokenizer on a text: bytes per token and tokens per word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from moetron.tokenizers.interface import Tokenizer

MEASURED_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Fertility:
    """Fertility on one source; words are separated by white space."""

    bytes_per_token: float
    tokens_per_word: float


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Fertility:
    """Measure fertility on about the first million characters of the texts."""
    measured: list[str] = []
    characters = 0
    for text in texts:
        if characters >= MEASURED_CHARACTERS:
            break
        measured.append(text)
        characters += len(text)
    tokens = max(1, sum(map(len, tokenizer.encode_batch(measured))))
    return Fertility(
        bytes_per_token=sum(len(text.encode()) for text in measured) / tokens,
        tokens_per_word=tokens / max(1, sum(len(text.split()) for text in measured)),
    )


def table(by_source: Mapping[str, Fertility]) -> str:
    """Return a text table, one source a line."""
    width = max([len("source"), *map(len, by_source)])
    lines = [f"{'source':<{width}}  bytes/token  tokens/word"]
    for source, found in by_source.items():
        lines.append(
            f"{source:<{width}}  {found.bytes_per_token:>11.2f}  {found.tokens_per_word:>11.2f}"
        )
    return "\n".join(lines)


def draw(by_source: Mapping[str, Fertility], file: BinaryIO) -> None:
    """Write a PNG with bars of bytes per token and tokens per word for each source."""
    from matplotlib.figure import Figure  # half a second of imports

    figure = Figure(figsize=(8, 1.5 + 0.3 * len(by_source)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names, found = list(by_source), list(by_source.values())
    left.barh(names, [each.bytes_per_token for each in found])
    right.barh(names, [each.tokens_per_word for each in found])
    left.set(xlabel="bytes per token", ylabel="source")
    right.set(xlabel="tokens per word (separated by white space)")
    left.invert_yaxis()
    figure.savefig(file, format="png", dpi=150)
