"""Progress of long work on standard error: a bar on a terminal, a line every 10 s elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

LINE_INTERVAL_S = 10.0

Item = TypeVar("Item")


class _Progress:
    """Bar, or lines where standard error is no terminal."""

    def __init__(self, name: str, **bar: Any) -> None:
        self._name = name
        self._start = self._last_line = time.monotonic()
        self.bar = tqdm(desc=name, disable=not sys.stderr.isatty(), **bar)

    def seconds(self) -> float:
        """Return the time since the start, above 0."""
        return max(time.monotonic() - self._start, 1e-9)

    def line(self, text: str, always: bool = False) -> None:
        """Print a line if one is due, or ``always``; the bar replaces lines on a terminal."""
        now = time.monotonic()
        if self.bar.disable and (always or now - self._last_line >= LINE_INTERVAL_S):
            self._last_line = now
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def report_batches(batches: Iterable[Item], total: int, name: str) -> Iterator[Item]:
    """Yield ``batches``; report each one, with the remaining time."""
    with _Progress(name, total=total, unit="batch") as progress:
        for done, batch in enumerate(batches, start=1):
            yield batch
            progress.bar.update()
            left_s = progress.seconds() / done * (total - done)
            progress.line(f"{done} of {total} batches, {left_s:.0f} s left", always=done == total)


class ReadProgress(_Progress):
    """Bytes read of a known total, with MB/s, tokens/s and the remaining time.

    ``done_bytes`` were read by an earlier run: they count as done, but not for the rates.
    """

    def __init__(self, name: str, total_bytes: int, done_bytes: int = 0) -> None:
        super().__init__(name, total=total_bytes, initial=done_bytes, unit="B", unit_scale=True)
        self._total_bytes, self._done_bytes = total_bytes, done_bytes
        self._bytes = self._tokens = 0

    def __enter__(self) -> "ReadProgress":
        return self

    def update(self, read_bytes: int, tokens: int) -> None:
        """Count work as done."""
        self._bytes += read_bytes
        self._tokens += tokens
        rate = self._tokens / self.seconds()
        self.bar.set_postfix_str(f"{rate / 1e6:.2f} Mtokens/s", refresh=False)
        self.bar.update(read_bytes)
        self.line(self.summary())

    def summary(self) -> str:
        """Return the fraction done and the rates."""
        seconds = self.seconds()
        done_bytes = self._done_bytes + self._bytes
        fraction = done_bytes / max(self._total_bytes, 1)
        left_s = seconds * (self._total_bytes - done_bytes) / max(self._bytes, 1)
        return (
            f"{fraction:.0%} of {self._total_bytes / 1e6:.1f} MB, "
            f"{self._bytes / 1e6 / seconds:.1f} MB/s, "
            f"{self._tokens / 1e6 / seconds:.2f} Mtokens/s, {left_s:.0f} s left"
        )
