"""Saver of checkpoints, blocking or on a thread while training continues."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from tqdm import tqdm

from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import file_sizes
from moetron.moe.checkpoint.save_load import save_checkpoint, take_checkpoint
from moetron.moe.config.schema.settings import Settings

logger = logging.getLogger(__name__)

CLOSE_S = 120.0
"""Time that a failed run waits for the checkpoint in progress."""


class Saver:
    """Saver of a run's checkpoints, one at a time.

    With ``--async-save`` a save copies this rank's tensors to host memory and returns; a thread
    writes the copy. As in a blocking save, ``latest`` moves when all ranks' files are on disk: a
    crash before that keeps the previous checkpoint.

    Args:
        settings: the run's, with ``checkpoint.save`` set if `save` is called.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, "save") if settings.checkpoint.async_save else None
        self._group: dist.ProcessGroup | None = None
        self._writing: Future[Path] | None = None

    def save(
        self,
        progress: Progress,
        model: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        stream_state: Mapping[str, Any],
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Save, after the previous save has ended; a collective over all ranks.

        Rank 0 prints a line when a save ends and when one continues in the background. Arguments
        and errors are those of ``save_checkpoint``.
        """
        self.wait()
        start_s = time.perf_counter()
        assert self._settings.checkpoint.save is not None
        folder = Path(self._settings.checkpoint.save)
        if self._thread is None:
            saved = save_checkpoint(
                folder, progress, model, optimizer, self._settings, stream_state, texts
            )
            _report_saved(progress, saved, start_s)
            return
        if self._group is None:
            # A gloo group of all ranks for the thread's collectives: on the training groups they
            # would interleave with NCCL calls in an order that differs between ranks.
            minutes = self._settings.parallel.distributed_timeout_minutes
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
        write = take_checkpoint(
            folder, progress, model, optimizer, self._settings, stream_state, texts, self._group
        )
        paused_s = time.perf_counter() - start_s
        _report(progress, f"saving a checkpoint in the background, paused for {paused_s:.1f} s")

        def write_and_report() -> Path:
            saved = write()
            _report_saved(progress, saved, start_s)
            return saved

        self._writing = self._thread.submit(write_and_report)

    def check(self) -> None:
        """Raise the error of a background save that has ended."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the background save; raise its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait up to ``CLOSE_S`` for a save in progress; for a run that has failed."""
        if self._writing is None:
            return
        done, _ = wait([self._writing], CLOSE_S)
        error = self._writing.exception() if done else TimeoutError("still being written")
        if error is not None:
            logger.warning("the last checkpoint was not completed: %s", error)
        self._writing = None


def _report_saved(progress: Progress, folder: Path, start_s: float) -> None:
    """Print the folder and size of a checkpoint and the seconds since its save began."""
    if dist.get_rank() == 0:
        megabytes = sum(file_sizes(folder).values()) / 1e6
        seconds = time.perf_counter() - start_s
        _report(progress, f"saved {folder} ({megabytes:,.1f} MB in {seconds:.1f} s)")


def _report(progress: Progress, text: str) -> None:
    """Print a line on rank 0, above a progress bar if there is one; callable from any thread."""
    if dist.get_rank() == 0:
        tqdm.write(f"step {progress.step} | {text}")
        sys.stdout.flush()
