"""How far an analysis is: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

LINE_INTERVAL_S = 10.0

Item = TypeVar("Item")


def shown(batches: Iterable[Item], total: int, name: str) -> Iterator[Item]:
    """Yield ``batches`` and report each on standard error, with the time that is left."""
    start = last_line = time.monotonic()
    with tqdm(desc=name, total=total, unit="batch", disable=not sys.stderr.isatty()) as bar:
        for done, batch in enumerate(batches, start=1):
            yield batch
            bar.update()
            now = time.monotonic()
            if bar.disable and (now - last_line >= LINE_INTERVAL_S or done == total):
                last_line = now
                left_s = (now - start) / done * (total - done)
                text = f"{name}: {done} of {total} batches, {left_s:.0f} s left"
                print(text, file=sys.stderr, flush=True)
