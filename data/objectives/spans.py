"""Pure functions of span corruption (T5: Raffel et al. 2020, section 3.1.4)."""

import hashlib

import numpy as np


def span_counts(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Return (noise tokens, noise spans) of a text of ``length`` >= 2 tokens."""
    noise = min(max(round(length * noise_density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise)


def corrupted_lengths(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Return lengths of (inputs, targets): kept or hidden tokens, a sentinel a span, one end."""
    noise, spans = span_counts(length, noise_density, mean_span)
    return length - noise + spans + 1, noise + spans + 1


def draws(key: str, count: int) -> np.ndarray:
    """Return uniform uint64 [count], a function of ``key`` alone on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=16, person=b"moetron draws").digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.asarray(raw, np.uint64)


def random_segments(segments: int, uniform: np.ndarray) -> np.ndarray:
    """Return the lengths of ``segments`` >= 1 non-empty parts, int64, uniform over compositions.

    ``uniform`` are distinct random numbers, one a token; the smallest ``segments - 1`` of all but
    the last mark the tokens after which a part ends.
    """
    ends = np.sort(np.argsort(uniform[:-1], kind="stable")[: segments - 1]) + 1
    return np.diff(ends, prepend=0, append=uniform.size)


def hide_spans(
    text: np.ndarray,
    noise_density: float,
    mean_span: float,
    sentinels: np.ndarray,
    uniform: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (kept, hidden) tokens, int64: a sentinel for each hidden span, and before it there.

    Args:
        text: int64, at least 2 tokens; it starts with a kept span.
        noise_density: fraction of hidden tokens.
        mean_span: mean length of a hidden span.
        sentinels: at least one a span, in the order of use.
        uniform: a random number a token, uint64.
    """
    noise, spans = span_counts(text.size, noise_density, mean_span)
    hidden_lengths = random_segments(spans, uniform[:noise])
    kept_lengths = random_segments(spans, uniform[noise:])
    lengths = np.stack([kept_lengths, hidden_lengths], axis=1).ravel()
    is_hidden = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
    used = sentinels[:spans]
    kept = np.insert(text[~is_hidden], np.cumsum(kept_lengths), used)
    starts = np.cumsum(hidden_lengths) - hidden_lengths
    return kept, np.insert(text[is_hidden], starts, used)
