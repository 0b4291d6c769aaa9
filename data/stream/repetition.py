"""OLMoE's run-time filter: no loss on samples that repeat themselves.

OLMo's ``instance_filter`` (olmo/data/memmap_dataset.py, olmo/util.py): a sample in which an n-gram
of 1 to 13 tokens occurs 32 times in a row passes through the model, but its labels are masked.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moetron.common.errors import UserError
from moetron.data.shards.ngram_runs import MAX_PERIOD, PROBES, repetitive


@dataclass(frozen=True)
class RepetitionFilter:
    """Filter that masks the loss of repetitive samples."""

    max_count: int
    """Consecutive occurrences of an n-gram that mask the sample; above ``PROBES``."""
    max_period: int = MAX_PERIOD
    """Longest such n-gram, in tokens."""

    def __post_init__(self) -> None:
        """Raise UserError for counts too low for the probes."""
        if self.max_count <= PROBES:
            raise UserError(f"--repetition-max-count {self.max_count}: give at least {PROBES + 1}")

    def masks(self, raw: np.ndarray) -> bool:
        """Return whether the raw tokens [T] of a sample contain such a repetition.

        An n-gram occurs r times in a row where n (r - 1) consecutive tokens equal those n positions
        later. A check of some fixed positions rules out nearly every sample.
        """
        first, second = _probes(raw.size, self.max_count, self.max_period)
        same = raw[first] == raw[second]
        if not (same[3:] & same[2:-1] & same[1:-2] & same[:-3]).any():
            return False
        return bool(repetitive(raw, np.array([raw.size]), self.max_count, self.max_period)[0])


@lru_cache(maxsize=64)
def _probes(size: int, max_count: int, max_period: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and those a period later; a repetition spans ``PROBES`` consecutive ones."""
    pairs = []
    for period in range(1, max_period + 1):
        places = np.arange(0, size - period, period * (max_count - 1) // PROBES)
        pairs.append(np.stack([places, places + period]))
    first, second = np.concatenate(pairs, axis=1)
    return first, second
