"""Console progress of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

from moetron.moe.monitoring.sinks import Loads, Row

_PREFERENCES = ("preference_loss", "accuracy")
"""Shown of evaluations of preferences."""


class Console:
    """Sink that prints progress every ``interval`` steps."""

    def __init__(self, first_step: int, last_step: int, interval: int) -> None:
        self._interval = interval
        self._first_step = first_step
        self._last_step = last_step
        self._start_s = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty() and sys.stdout.isatty():  # `| tee log` gets lines too
            self._bar = tqdm(initial=first_step, total=last_step, unit="step", dynamic_ncols=True)

    def step(self, row: Row) -> None:
        """Advance the bar; print metrics every ``interval`` steps and at the end."""
        step = row["step"]
        due = step % self._interval == 0 or step == self._last_step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if due:
                self._bar.set_postfix_str(_metrics_text(row))
        elif due:
            print(f"step {step}/{self._last_step} | {_metrics_text(row)} | ETA {self._eta(step)}")
            sys.stdout.flush()

    def expert_load(self, step: int, loads: Loads) -> None:
        """Do nothing: `step` prints one number."""

    def event(self, row: Row) -> None:
        """Print an event."""
        self.print_line(f"step {row['step']} | {row['kind']}: {row['text']} ({row['action']})")

    def rewind(self, step: int) -> None:
        """Return to an earlier step; the time to the end counts from here."""
        self._first_step, self._start_s = step, time.perf_counter()
        self.print_line(f"step {step} | continued from the checkpoint, without the samples since")

    def validation(self, row: Row) -> None:
        """Print an evaluation."""
        sources = ", ".join(f"{name} {loss:.4f}" for name, loss in row["source_losses"].items())
        by_source = f" ({sources})" if len(row["source_losses"]) > 1 else ""
        self.print_line(
            f"step {row['step']} | validation loss {row['validation_loss']:.4f}{by_source}"
            + "".join(f" | {n.replace('_', ' ')} {row[n]:.4f}" for n in _PREFERENCES if n in row)
        )

    def print_line(self, text: str) -> None:
        """Print a separate line, above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Close the bar and keep it on the screen."""
        if self._bar is not None:
            self._bar.close()

    def _eta(self, step: int) -> str:
        """Return the time to the end at the mean speed, including evaluations and checkpoints."""
        elapsed_s = time.perf_counter() - self._start_s
        left = elapsed_s / (step - self._first_step) * (self._last_step - step)
        return f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"


def _metrics_text(row: Row) -> str:
    """Return the main metrics of a step as text."""
    trained = "preference_loss" if "preference_loss" in row else "lm_loss"
    parts = [
        f"{trained.removeprefix('lm_').replace('_', ' ')} {row[trained]:.4f}",
        f"grad norm {row['grad_norm']:.3f}",
        f"lr {row['lr']:.2e}",
    ]
    if "expert_load_max_over_mean" in row:
        parts.append(f"fullest expert {row['expert_load_max_over_mean']:.2f}x mean")
    if "dropped_fraction" in row:
        parts.append(f"dropped {100 * row['dropped_fraction']:.3g} %")
    parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    parts.append(f"{row['tflops_per_s']:.3g} TFLOP/s a rank")
    if "mfu" in row:
        parts.append(f"MFU {100 * row['mfu']:.3g} %")
    parts.append(f"peak memory {row['peak_memory_bytes'] / 2**30:.2f} GiB a rank")
    return " | ".join(parts)
