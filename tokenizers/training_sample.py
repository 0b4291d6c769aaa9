"""Bounded, deterministic sample of a corpus for training a tokenizer."""

import heapq
import random
from collections.abc import Callable, Iterable, Iterator, Mapping

BLOCK_CHARACTERS = 4096

LabelledTexts = Iterable[tuple[str, str]]
"""(source, text) of every document."""


def blocks(text: str, characters: int = BLOCK_CHARACTERS) -> Iterator[str]:
    """Split a text into blocks of full lines of at most ``characters``; longer lines are split."""
    start = 0
    while start < len(text):
        end = start + characters
        if end < len(text):
            newline = text.rfind("\n", start, end)
            end = newline + 1 if newline >= 0 else end
        yield text[start:end]
        start = end


class Reservoir:
    """Uniform sample of blocks from a stream, without replacement, within a character budget.

    Every block gets a random key and the smallest keys are kept (bottom-k sampling), so that one
    pass over a source of any size holds at most the budget and one block.
    """

    def __init__(self, budget_characters: int, seed: str) -> None:
        self._budget = budget_characters
        self._random = random.Random(seed)
        self._kept: list[tuple[float, int, str]] = []
        self._held_characters = 0
        self._seen = 0

    def add(self, text: str) -> None:
        """Add the blocks of one text."""
        for block in blocks(text):
            heapq.heappush(self._kept, (-self._random.random(), self._seen, block))
            self._seen += 1
            self._held_characters += len(block)
            while self._held_characters > self._budget:
                self._held_characters -= len(heapq.heappop(self._kept)[2])

    def drawn(self) -> list[str]:
        """Return the kept blocks in the order in which they were added."""
        return [block for _, _, block in sorted(self._kept, key=lambda entry: entry[1])]


def unimax(sizes: Mapping[str, int], budget: int, epochs: float) -> dict[str, float]:
    """Return how much of each source to take: as even as possible, at most ``epochs`` times each.

    UniMax (arXiv 2304.09151, algorithm 1): from the smallest source to the largest, each gets an
    even part of the remaining budget or its cap, whichever is less.

    Args:
        sizes: Characters of each source.
        budget: Characters to take in all.
        epochs: Maximum repetitions N of a source.
    """
    taken: dict[str, float] = {}
    left = float(budget)
    for rank, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        taken[name] = min(left / (len(sizes) - rank), sizes[name] * epochs)
        left -= taken[name]
    return taken


def sample_sources(
    read: Callable[[], LabelledTexts], budget: int, epochs: float | None, seed: int
) -> dict[str, list[str]]:
    """Return blocks to train on, by source, sorted by name; reads the corpus twice.

    Args:
        read: Function that starts a pass over the corpus.
        budget: Characters to take in all.
        epochs: UniMax's cap N, rounded to complete copies above one epoch; None: each source in
            proportion to its size.
        seed: Seed of the sample.
    """
    sizes: dict[str, int] = {}
    for source, text in read():
        sizes[source] = sizes.get(source, 0) + len(text)
    if epochs is None:
        fraction = min(1.0, budget / max(1, sum(sizes.values())))
        taken = {source: size * fraction for source, size in sizes.items()}
    else:
        taken = unimax(sizes, budget, epochs)
    reservoirs = {
        source: Reservoir(min(size, round(taken[source])), f"{seed}/{source}")
        for source, size in sorted(sizes.items())
    }
    for source, text in read():
        reservoirs[source].add(text)
    return {
        source: reservoir.drawn() * max(1, round(taken[source] / max(1, sizes[source])))
        for source, reservoir in reservoirs.items()
    }
