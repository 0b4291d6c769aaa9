"""How far long work has come: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_INTERVAL_S = 10.0


class Progress:
    """Bytes read of a known total, with MB/s, tokens/s and the time that is left.

    ``done_bytes`` were read by an earlier run and count for the share alone.
    """

    def __init__(self, name: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._name, self._total_bytes, self._done_bytes = name, total_bytes, done_bytes
        self._bytes = self._tokens = 0
        self._start = self._last_line = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=name,
            total=total_bytes,
            initial=done_bytes,
            unit="B",
            unit_scale=True,
            disable=not on_terminal,
        )

    def update(self, read_bytes: int, tokens: int) -> None:
        """Count more work as done."""
        self._bytes += read_bytes
        self._tokens += tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate / 1e6:.2f} Mtokens/s", refresh=False)
        self._bar.update(read_bytes)
        if self._bar.disable and now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            print(f"{self._name}: {self.summary()}", file=sys.stderr, flush=True)

    def summary(self) -> str:
        """Share done and speed so far."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        done_bytes = self._done_bytes + self._bytes
        share = done_bytes / max(self._total_bytes, 1)
        left_s = seconds * (self._total_bytes - done_bytes) / max(self._bytes, 1)
        return (
            f"{share:.0%} of {self._total_bytes / 1e6:.1f} MB, "
            f"{self._bytes / 1e6 / seconds:.1f} MB/s, "
            f"{self._tokens / 1e6 / seconds:.2f} Mtokens/s, {left_s:.0f} s left"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
