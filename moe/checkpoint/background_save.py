"""Saver of checkpoints, blocking or in the writer process while training continues."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from tqdm import tqdm

from moetron.common.errors import RunError, UserError
from moetron.common.watch import activity
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.run_folder import file_sizes
from moetron.moe.checkpoint.save_load import save_checkpoint, take_checkpoint
from moetron.moe.checkpoint.writer.writer_process import WriterProcess
from moetron.moe.config.schema.settings import Settings

logger = logging.getLogger(__name__)

CLOSE_S = 120.0
"""Time that a failed run waits for the checkpoint in progress."""
RETRY_S = 10.0
"""Pause before the next attempt to save at the end of a run."""
FAILURES = (OSError, RunError, UserError)
"""Errors of storage, the same on all ranks: the run continues without this checkpoint."""


class Saver:
    """Saver of a run's checkpoints, one at a time.

    With ``--async-save`` a save copies this rank's tensors to host memory and returns; the writer
    process writes the copy. As in a blocking save, ``latest`` moves when all ranks' files are on
    disk: a crash before that keeps the previous checkpoint.

    A failed save is a warning, until ``--max-failed-saves`` of them failed in a row. All ranks
    count alike: a failure reaches all of them, and they count where they all wait.

    Args:
        settings: the run's, with ``checkpoint.save`` set if `save` is called.
        writer: this rank's process, for ``--async-save``.
        saved: position of the run's last checkpoint.
    """

    def __init__(
        self,
        settings: Settings,
        writer: WriterProcess | None = None,
        saved: Progress | None = None,
    ) -> None:
        self._settings = settings
        self._writer = writer
        self._thread = None if writer is None else ThreadPoolExecutor(1, "save")
        self._writing: Future[Path] | None = None
        self._position: Progress | None = None
        self._failed = 0
        self.saved = saved
        """Position of the last complete checkpoint."""

    @activity.doing("save")
    def save(
        self,
        progress: Progress,
        model: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        stream_state: Mapping[str, Any],
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Save, after the previous save has ended, unless it was of ``progress``; collective.

        Rank 0 prints a line when a save ends and when one continues in the background. Arguments
        are those of ``save_checkpoint``.

        Raises:
            OSError, RunError, UserError: of the last one of ``--max-failed-saves``.
        """
        self.wait()
        if self.saved == progress:
            return
        start_s = time.perf_counter()
        self._position = progress
        assert self._settings.checkpoint.save is not None
        folder = Path(self._settings.checkpoint.save)
        contents = folder, progress, model, optimizer, self._settings, stream_state, texts
        try:
            if self._thread is None:
                _report_saved(progress, save_checkpoint(*contents), start_s)
                self.saved, self._failed = progress, 0
                return
            write = take_checkpoint(*contents, self._writer)
        except FAILURES as error:
            self._fail(error)
            return
        paused_s = time.perf_counter() - start_s
        report(progress, f"saving a checkpoint in the background, paused for {paused_s:.1f} s")

        def write_and_report() -> Path:
            try:
                saved = write()
            except FAILURES as error:
                report(progress, f"the checkpoint failed: {error}")  # counted by `wait`
                raise
            _report_saved(progress, saved, start_s)
            return saved

        self._writing = self._thread.submit(write_and_report)

    @activity.doing("save")
    def save_at_end(
        self,
        progress: Progress,
        model: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        stream_state: Mapping[str, Any],
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Save and wait until it is done, with a pause after each failure; as `save`."""
        while True:
            self.save(progress, model, optimizer, stream_state, texts)
            self.wait()
            if self.saved == progress:
                return
            time.sleep(RETRY_S)

    def check(self) -> None:
        """Raise the error of a background save that has ended, unless it is one of storage.

        Those are counted when all ranks wait for the save: one rank may learn of it a step earlier.
        """
        if self._writing is not None and self._writing.done():
            error = self._writing.exception()
            if error is not None and not isinstance(error, FAILURES):
                raise error

    def wait(self) -> None:
        """Wait for the background save, and count its failure; raises as `save`."""
        writing, self._writing = self._writing, None
        if writing is None or self._writer is None:
            return
        self._writer.hurry()
        try:
            writing.result()
        except FAILURES as error:
            self._fail(error)
        else:
            self.saved, self._failed = self._position, 0

    def close(self) -> None:
        """Wait up to ``CLOSE_S`` for a save in progress; for a run that has failed."""
        if self._writing is None or self._writer is None:
            return
        self._writer.hurry()
        done, _ = wait([self._writing], CLOSE_S)
        error = self._writing.exception() if done else TimeoutError("still being written")
        if error is not None:
            logger.warning("the last checkpoint was not completed: %s", error)
        self._writing = None

    def _fail(self, error: Exception) -> None:
        """Count a failure and warn; raise it if it is one too many."""
        self._failed += 1
        limit, step = self._settings.checkpoint.max_failed_saves, self._position
        if self._failed >= limit:
            raise error
        if dist.get_rank() == 0:
            assert step is not None
            logger.error(
                "THE CHECKPOINT OF STEP %d WAS NOT SAVED (failure %d in a row, --max-failed-saves "
                "%d): %s; training continues and tries again at the next save",
                *(step.step, self._failed, limit, error),
            )


def _report_saved(progress: Progress, folder: Path, start_s: float) -> None:
    """Print the folder and size of a checkpoint and the seconds since its save began."""
    if dist.get_rank() == 0:
        megabytes = sum(file_sizes(folder).values()) / 1e6
        seconds = time.perf_counter() - start_s
        report(progress, f"saved {folder} ({megabytes:,.1f} MB in {seconds:.1f} s)")


def report(progress: Progress, text: str) -> None:
    """Print a line on rank 0, above a progress bar if there is one; callable from any thread."""
    if dist.get_rank() == 0:
        tqdm.write(f"step {progress.step} | {text}")
        sys.stdout.flush()
