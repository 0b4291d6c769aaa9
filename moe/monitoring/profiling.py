"""Profiles of single steps: Chrome traces, capture ranges of Nsight Systems, records of memory.

Without --profile and --record-memory-history nothing here runs but two comparisons a step.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.trace_ranges import named_parts

logger = logging.getLogger(__name__)

FOLDER = "profile"
"""Folder of traces in the run's."""
_MEMORY_EVENTS = 1_000_000


class Profiler:
    """Profiler of one rank of a run, by the settings of the group ``profiling``.

    Steps --profile-step-start + 1 to --profile-step-end of the run are profiled, counted from 1.

    Args:
        settings: the run's.
        rank: of this process.
        device: of this rank.
        chunks: this rank's model, whose parts are named with --nvtx-ranges.
        optimizer: its update is named too.
    """

    def __init__(
        self,
        settings: Settings,
        rank: int,
        device: torch.device,
        chunks: Sequence[torch.nn.Module],
        optimizer: Any,
    ) -> None:
        chosen = settings.profiling
        self._chosen, self._rank, self._device = chosen, rank, device
        self._chunks, self._optimizer = chunks, optimizer
        self._folder = Path(settings.checkpoint.save or ".") / FOLDER
        self._profiles = chosen.profile and rank in chosen.profile_ranks
        self._remembers = chosen.record_memory_history and rank in chosen.profile_ranks
        if self._remembers:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._running: ExitStack | None = None
        self._last = 0  # profiled step

    @contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Profile a step if it is due; ``done`` steps precede it."""
        chosen = self._chosen
        due = chosen.profile_step_start <= done < chosen.profile_step_end
        if self._profiles and due and self._running is None:
            self._running = self._started(done)
        if self._running is None:
            yield
        else:
            with record_function(f"step {done + 1}"):
                yield
            self._last = done + 1
        if done + 1 == chosen.profile_step_end:
            self.close()

    def close(self) -> None:
        """Write what was recorded, also after an error; idempotent."""
        if self._running is not None:
            self._running.close()
            self._running = None
        if self._remembers:
            self._remembers = False
            path = self._folder / self._chosen.memory_snapshot_path
            path = path.with_stem(f"{path.stem}_rank_{self._rank}")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            logger.warning("memory of rank %d: %s", self._rank, path)

    def _started(self, done: int) -> ExitStack:
        """Start profiling; return the context that ends it."""
        stack = ExitStack()
        if self._chosen.nvtx_ranges:
            stack.enter_context(named_parts(self._chunks, self._optimizer))
        if self._chosen.use_pytorch_profiler:
            stack.callback(self._write, self._trace(), done)
        else:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            stack.callback(torch.cuda.profiler.stop)
            stack.callback(torch.cuda.synchronize)
            stack.enter_context(torch.autograd.profiler.emit_nvtx(record_shapes=True))
        return stack

    def _trace(self) -> Any:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        trace = torch.profiler.profile(activities=kinds, record_shapes=True)
        trace.start()
        return trace

    def _write(self, trace: Any, done: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # the end of the last step is still running
        trace.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        steps = f"{done + 1}_to_{self._last}"
        path = self._folder / f"rank_{self._rank}_steps_{steps}.pt.trace.json"
        trace.export_chrome_trace(str(path))
        logger.warning("profile of rank %d: %s", self._rank, path)
