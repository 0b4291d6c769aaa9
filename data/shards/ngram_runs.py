"""Find n-grams that repeat consecutively (OLMoE, section 2 and appendix)."""

import numpy as np

MAX_PERIOD = 13
"""Longest n-gram checked for repetition, in tokens (OLMoE, section 2 and appendix)."""
PROBES = 4
"""Consecutive equal pairs, sampled at intervals, that trigger the exact check."""


def repetitive(
    tokens: np.ndarray, lengths: np.ndarray, repetitions: int, max_period: int = MAX_PERIOD
) -> np.ndarray:
    """Find documents with an n-gram of up to ``max_period`` tokens ``repetitions`` times in a row.

    ``tokens`` [sum(lengths)] of documents of ``lengths`` [documents] -> bool [documents]. An n-gram
    occurs r times in a row where n (r - 1) consecutive tokens equal those n positions later.
    """
    found = _suspects(tokens, lengths, repetitions, max_period)
    if not found.any():
        return found
    ends, lengths = np.cumsum(lengths)[found], lengths[found]
    tokens = np.concatenate([tokens[e - n : e] for e, n in zip(ends, lengths, strict=True)])
    document = np.repeat(np.flatnonzero(found), lengths)
    found[:] = False
    for period in range(1, max_period + 1):
        same = tokens[period:] == tokens[:-period]
        same &= document[period:] == document[:-period]
        edges = np.flatnonzero(np.diff(same, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        found[document[starts[ends - starts >= period * (repetitions - 1)]]] = True
    return found


def _suspects(
    tokens: np.ndarray, lengths: np.ndarray, repetitions: int, max_period: int
) -> np.ndarray:
    """Find documents that sampled positions do not rule out: bool [documents].

    A long enough run of equal pairs spans ``PROBES`` consecutive sampled positions.
    """
    if repetitions <= PROBES:
        return np.ones(lengths.size, bool)
    suspects, ends = np.zeros(lengths.size, bool), np.cumsum(lengths)
    for period in range(1, max_period + 1):
        step = period * (repetitions - 1) // PROBES
        same = tokens[:-period:step] == tokens[period::step]
        places = np.flatnonzero(same[3:] & same[2:-1] & same[1:-2] & same[:-3]) * step
        suspects[np.searchsorted(ends, places, side="right")] = True
    return suspects
