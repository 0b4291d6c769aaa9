"""The words of ``--data-path``: PREFIX PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ..."""

import math
from collections.abc import Iterator, Sequence

from moetron.common.errors import UserError

_ENDINGS = (".bin", ".idx")


def weight_or_none(word: str) -> float | None:
    """Return the number that a word spells, a weight; None for a prefix."""
    try:
        return float(word)
    except ValueError:
        return None


def bare_prefixes(words: Sequence[str]) -> list[str]:
    """Return words without .bin or .idx; both files of a shard in a row become one prefix."""
    bare: list[str] = []
    for last, word in zip(["", *words], words, strict=False):
        prefix, ending = word[:-4], word[-4:]
        if ending not in _ENDINGS:
            bare.append(word)
        elif not (last[:-4] == prefix and last[-4:] in _ENDINGS and last != word):
            bare.append(prefix)
    return bare


def prefixes_of(words: Sequence[str]) -> list[str]:
    """Return the prefixes of a data path, well formed or not."""
    weighted = bool(words) and weight_or_none(words[0]) is not None
    return list(words[1::2] if weighted else words)


def data_path_problems(words: Sequence[str], flag: str) -> Iterator[str]:
    """Yield what is wrong with the form and the weights of a data path."""
    if not words:
        yield f"{flag} is empty: give PREFIX, or pairs WEIGHT PREFIX"
    weighted = [weight_or_none(word) is not None for word in words]
    if not any(weighted):
        return
    if weighted != [True, False] * (len(words) // 2):
        yield f"{flag} {' '.join(words)}: give only prefixes, or pairs WEIGHT PREFIX"
    for word in words[::2]:
        weight = weight_or_none(word)
        if weight is not None and not 0 < weight < math.inf:
            yield f"{flag}: weight {word!r} must be a number above 0"


def split_data_path(words: Sequence[str]) -> tuple[list[float] | None, list[str]]:
    """Return the weights, None where there are none, and the bare prefixes of a data path.

    Raises:
        UserError: names every problem.
    """
    words = bare_prefixes(words)
    if problems := list(data_path_problems(words, "--data-path")):
        raise UserError("\n".join(problems))
    prefixes = prefixes_of(words)
    weights = None if len(prefixes) == len(words) else [float(word) for word in words[::2]]
    return weights, prefixes
