"""What the training loop asks of data: numbered samples."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class SampleStream(Protocol):
    """Samples by number, so that any rank of any layout can ask for any of them.

    Sample n is a function of (data, settings, seed, n) alone. It holds ``tokens`` int64 [S],
    ``labels`` int64 [S] (``labels[i]`` follows ``tokens[i]``), ``loss_mask`` float32 [S] and
    ``source``, the number of the corpus it came from.
    """

    source_names: list[str]

    def __len__(self) -> int:
        """Samples that may be asked for; a training stream repeats its sources without end."""
        ...

    def __getitem__(self, n: int) -> Mapping[str, np.ndarray | int]:
        """Sample ``n``."""
        ...

    def state(self) -> dict[str, Any]:
        """What identifies the stream (JSON): sources, weights, seed, tokenizer fingerprint."""
        ...
