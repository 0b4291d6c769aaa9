"""Span corruption's arithmetic (T5: Raffel et al. 2020, section 3.1.4), pure functions."""

import hashlib

import numpy as np


def span_counts(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """(noise tokens, noise spans) of a text of ``length`` >= 2 tokens."""
    noise = min(max(round(length * noise_density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise)


def corrupted_lengths(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """(inputs, targets) in tokens: what is kept or lost, a sentinel a span, an end each."""
    noise, spans = span_counts(length, noise_density, mean_span)
    return length - noise + spans + 1, noise + spans + 1


def draws(key: str, count: int) -> np.ndarray:
    """uint64 [count], uniform; a function of the key alone, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=16, person=b"moetron draws").digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.asarray(raw, np.uint64)


def random_segments(segments: int, uniform: np.ndarray) -> np.ndarray:
    """Lengths of ``segments`` >= 1 non-empty parts of a whole, int64, every composition as likely.

    ``uniform`` are distinct random numbers, one for each of the whole's tokens: the least
    ``segments - 1`` of all but the last say after which tokens it is cut.
    """
    whole = uniform.size
    cuts = np.sort(np.argsort(uniform[:-1], kind="stable")[: segments - 1]) + 1
    return np.diff(cuts, prepend=0, append=whole)
