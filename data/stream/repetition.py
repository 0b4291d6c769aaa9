"""OLMoE's filter at run time: no loss on samples that repeat themselves.

OLMo's ``instance_filter`` (olmo/data/memmap_dataset.py, olmo/util.py): a sample in which an n-gram
of 1 to 13 tokens stands 32 times in a row still goes through the model, but its labels do not
count.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moetron.common.errors import UserError
from moetron.data.shards.ngram_runs import MAX_PERIOD, PROBES, repetitive


@dataclass(frozen=True)
class RepetitionFilter:
    """Which samples count for nothing."""

    max_count: int
    """Times in a row, above ``PROBES``, that an n-gram must stand."""
    max_period: int = MAX_PERIOD
    """Longest such n-gram, in tokens."""

    def __post_init__(self) -> None:
        """Refuse counts that too few pairs would show."""
        if self.max_count <= PROBES:
            raise UserError(f"--repetition-max-count {self.max_count}: give at least {PROBES + 1}")

    def masks(self, raw: np.ndarray) -> bool:
        """Whether the raw tokens [T] of a sample hold such a repetition.

        An n-gram r times in a row is n (r - 1) tokens in a row that equal those n places later: a
        look at some fixed places rules out nearly every sample.
        """
        first, second = _probes(raw.size, self.max_count, self.max_period)
        same = raw[first] == raw[second]
        if not (same[3:] & same[2:-1] & same[1:-2] & same[:-3]).any():
            return False
        return bool(repetitive(raw, np.array([raw.size]), self.max_count, self.max_period)[0])


@lru_cache(maxsize=64)
def _probes(size: int, max_count: int, max_period: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and the places a period later; a run that counts covers ``PROBES`` in a row."""
    pairs = []
    for period in range(1, max_period + 1):
        places = np.arange(0, size - period, period * (max_count - 1) // PROBES)
        pairs.append(np.stack([places, places + period]))
    first, second = np.concatenate(pairs, axis=1)
    return first, second
