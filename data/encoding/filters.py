"""Filters of documents: pure functions of a document's row, text and tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetron.data.encoding.frequent_words import frequent_words
from moetron.data.shards.ngram_runs import repetitive


@dataclass(frozen=True)
class Filters:
    """Rules for dropping documents; by default none."""

    max_repetitions: int | None = None
    """Drop documents in which an n-gram occurs this many times in a row (OLMoE: 32)."""
    frequent_words: bool = False
    """Drop documents where one word is over 30 % of all words, or two over 50 % (OLMoE, code)."""
    min_stars: int = 0
    """Drop documents with fewer stars (OLMoE, code: 2); a missing number counts as 0."""
    stars_key: str = "max_stars_count"
    """Key of the stars in a row or its ``metadata`` (StarCoder's name)."""
    deduplicate: bool = False
    """Drop documents with the token ids of an earlier one (``data.encoding.duplicates``)."""
    min_tokens: int = 0
    """Drop documents shorter than this."""
    max_tokens: int | None = None
    """Drop documents longer than this."""

    def problems(self) -> list[str]:
        """Return all problems of the settings."""
        found = []
        if self.max_repetitions is not None and self.max_repetitions < 2:
            found.append(f"--max-repetitions {self.max_repetitions}: must be at least 2")
        if self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1):
            found.append(f"--max-tokens {self.max_tokens}: must be at least 1 and --min-tokens")
        return found

    @property
    def row_keys(self) -> tuple[str, ...]:
        """Return the keys of a row that the rules read, other than its text."""
        return (self.stars_key, "metadata") if self.min_stars > 0 else ()

    def by_row(self, row: Mapping[str, Any]) -> str | None:
        """Return the name of the rule that drops a document by its row, or None."""
        few = self.min_stars > 0 and stars(row, self.stars_key) < self.min_stars
        return "few stars" if few else None

    def by_text(self, text: str, row: Mapping[str, Any]) -> str | None:
        """Return the name of the rule that drops a document before encoding, or None."""
        return self.by_row(row) if text else "empty"

    def by_words(self, texts: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, documents to drop: bool [documents]) of each rule on words."""
        if self.frequent_words:
            yield "frequent words", frequent_words(texts)

    def by_tokens(
        self, tokens: np.ndarray, lengths: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, documents to drop: bool [documents]) of each rule on tokens."""
        if self.min_tokens > 0:
            yield "short", lengths < self.min_tokens
        if self.max_tokens is not None:
            yield "long", lengths > self.max_tokens
        if self.max_repetitions is not None:
            yield "repetitive", repetitive(tokens, lengths, self.max_repetitions)


def stars(row: Mapping[str, Any], key: str) -> float:
    """Return the number under ``key`` of a row or of its ``metadata``; 0 if there is none."""
    metadata = row.get("metadata")
    value = row.get(key, metadata.get(key) if isinstance(metadata, Mapping) else None)
    return value if isinstance(value, int | float) else 0
