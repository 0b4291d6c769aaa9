"""Sinks for the metrics of a run: metrics.jsonl, validation.jsonl, TensorBoard, W&B."""

import importlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moetron.common.errors import UserError
from moetron.common.files import write_text
from moetron.moe.config.schema.settings import Settings
from moetron.moe.health.events import FILE as EVENTS
from moetron.moe.health.events import MACHINE_KINDS

logger = logging.getLogger(__name__)
WANDB_RUN_ID = "wandb_run_id"
"""File in a run's folder with its id on Weights & Biases."""
Row = Mapping[str, Any]
"""One line: ``step`` and the metrics that apply."""


MACHINE_METRICS = frozenset(
    [
        "step_time_s",
        "tokens_per_s",
        "tflops_per_s",
        "mfu",
        "mfu_peak_tflops_per_s",
        "mfu_peak_basis",
        "peak_memory_bytes",
    ]
)
"""Metrics that depend on the machine and the clock; the others are reproducible to the last bit."""
Loads = Mapping[str, np.ndarray]
"""Load over mean load of every expert, [E], by layer; empty if dense."""


class Sink(Protocol):
    """Destination of metrics."""

    def step(self, row: Row) -> None:
        """Write the metrics of a training step."""
        ...

    def validation(self, row: Row) -> None:
        """Write the metrics of an evaluation."""
        ...

    def expert_load(self, step: int, loads: Loads) -> None:
        """Write the load of every expert, every --expert-load-interval steps."""
        ...

    def event(self, row: Row) -> None:
        """Write an event: ``step``, ``kind``, ``action``, ``text`` and more."""
        ...

    def rewind(self, step: int) -> None:
        """Drop what follows ``step``: the run has returned to its checkpoint."""
        ...

    def close(self) -> None:
        """Flush and release resources."""
        ...


class JsonLines:
    """File of JSON objects, one per line, each with its ``step``; floats keep every bit.

    Lines after ``last_step`` belong to steps that a resume repeats: they are dropped, atomically,
    but for those with a ``kind`` in ``kept_kinds``.
    """

    def __init__(
        self, path: Path, last_step: int, kept_kinds: Collection[str] = frozenset()
    ) -> None:
        self._path = path
        self._kept_kinds = kept_kinds
        self._waiting = b""
        self._failed = False
        self._file = self._without(lambda step: step > last_step)

    def write(self, row: Row) -> None:
        """Append a line; if the disk is full or fails, keep it for the next write."""
        self._waiting += (json.dumps(dict(row)) + "\n").encode()
        self._drain()

    def _drain(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.error("%s: cannot be written, lines are kept: %s", self._path, error)
            self._failed = True

    def rewrite(self, row: Row) -> None:
        """Write a line and drop its step's earlier one: a finished run repeats its evaluation."""
        self._file.close()
        self._file = self._without(lambda step: step == row["step"])
        self.write(row)

    def rewind(self, last_step: int) -> None:
        """Drop the lines of steps after ``last_step``."""
        self._file.close()
        self._file = self._without(lambda step: step > last_step)

    def _without(self, dropped: Callable[[float], bool]) -> FileIO:
        """Drop the lines of some steps and open the file to append."""
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if not dropped(_step(line, self._kept_kinds))]
            if kept != lines:
                write_text(self._path, "".join(kept))
        return FileIO(self._path, "a")

    def close(self) -> None:
        """Close the file."""
        self._drain()
        if self._waiting:
            logger.error("%s: the last %d bytes are lost", self._path, len(self._waiting))
        self._file.close()


def _step(line: str, kept_kinds: Collection[str]) -> float:
    """Return the step of a line; infinity for a line that a crash truncated, 0 for a kept kind.

    An event that set the run back belongs to the step from which it continued.
    """
    try:
        row = json.loads(line)
        if row.get("kind") in kept_kinds:
            return 0
        return int(row.get("rolled_back_to", row["step"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return math.inf


class LineFiles:
    """``metrics.jsonl``, ``validation.jsonl`` and ``events.jsonl`` in a run's folder.

    Raises:
        UserError: when the folder cannot be written.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = JsonLines(folder / "metrics.jsonl", last_step)
            self._validation = JsonLines(folder / "validation.jsonl", last_step)
            self._events = JsonLines(folder / EVENTS, last_step, MACHINE_KINDS)
        except OSError as error:
            raise UserError(f"--save {folder}: cannot write there: {error.strerror}") from error

    def step(self, row: Row) -> None:
        """Append a line to metrics.jsonl."""
        self._metrics.write(row)

    def validation(self, row: Row) -> None:
        """Write the step's only line of validation.jsonl."""
        self._validation.rewrite(row)

    def expert_load(self, step: int, loads: Loads) -> None:
        """Do nothing: the step's line has each layer's maximum; all loads would fill the file."""

    def event(self, row: Row) -> None:
        """Append a line to events.jsonl."""
        self._events.write(row)

    def rewind(self, step: int) -> None:
        """Drop later lines of metrics and evaluations; events stay."""
        self._metrics.rewind(step)
        self._validation.rewind(step)

    def close(self) -> None:
        """Close all files."""
        self._metrics.close()
        self._validation.close()
        self._events.close()


class TensorBoard:
    """Sink for TensorBoard: scalars of steps below ``train/``, of evaluations in ``validation/``.

    Below ``expert_load/`` a histogram for each layer and a heat map of all.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        self._folder = folder
        self._writer: Any = None
        self.rewind(last_step)

    def step(self, row: Row) -> None:
        """Write one scalar for each number."""
        self._write("train", row)

    def validation(self, row: Row) -> None:
        """Write one scalar for each number."""
        self._write("validation", row)

    def expert_load(self, step: int, loads: Loads) -> None:
        """Write a histogram of each layer's experts, and a heat map of all."""
        with self._tolerant() as writer:
            for name, load_E in loads.items():
                writer.add_histogram(f"expert_load/{name}", load_E, step)
            if loads:
                writer.add_image("expert_load/all", heat_map(loads), step, dataformats="HWC")

    def event(self, row: Row) -> None:
        """Write the event as text."""
        with self._tolerant() as writer:
            writer.add_text(f"events/{row['kind']}", row["text"], row["step"])

    def rewind(self, step: int) -> None:
        """Open a new file, which hides values of later steps in the earlier ones."""
        from torch.utils.tensorboard import SummaryWriter  # a second of imports

        if self._writer is not None:
            self.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def close(self) -> None:
        """Flush the buffer."""
        with self._tolerant() as writer:
            writer.close()

    def _write(self, prefix: str, row: Row) -> None:
        with self._tolerant() as writer:
            for name, value in flat(row):
                writer.add_scalar(f"{prefix}/{name}", value, row["step"])

    @contextmanager
    def _tolerant(self) -> Iterator[Any]:
        """Yield the writer; a disk that fails ends TensorBoard's thread, but not the run."""
        try:
            yield self._writer
        except OSError as error:
            text = "TensorBoard is off until the next start, metrics.jsonl has its values: %s"
            logger.error(text, error)
            self._writer = _Nothing()


class _Nothing:
    """Writer that drops everything."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **options: None


class WandB:
    """Sink for Weights & Biases with the same contents, one W&B run across resumes.

    ``FOLDER/wandb_run_id`` holds the run's id since its first start. A run that starts at step 0
    gets a new one. Weights & Biases accepts no second value for a step: steps that a resume repeats
    keep their first values.

    Args:
        folder: the run's, also its name unless ``--wandb-exp-name`` is given.
        last_step: the last step that is not repeated; 0: a fresh run.
        settings: the run's, shown as its configuration.

    Raises:
        UserError: when wandb is not installed.
    """

    def __init__(self, folder: Path, last_step: int, settings: Settings) -> None:
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError("--wandb-project needs `pip install moetron[log]`") from error
        logging, path = settings.logging, folder / WANDB_RUN_ID
        known = last_step > 0 and path.exists()
        self._run = self._wandb.init(
            project=logging.wandb_project,
            entity=logging.wandb_entity,
            name=logging.wandb_exp_name or folder.resolve().name,
            id=path.read_text(encoding="utf-8").strip() if known else None,
            resume="allow",
            dir=str(folder),
            config=settings.model_dump(mode="json"),
            allow_val_change=True,  # settings may change at a resume
        )
        write_text(path, f"{self._run.id}\n")
        self._first_step = self._run.starting_step

    def step(self, row: Row) -> None:
        """Write one scalar for each number."""
        self._log("train", row)

    def validation(self, row: Row) -> None:
        """Write one scalar for each number."""
        self._log("validation", row)

    def expert_load(self, step: int, loads: Loads) -> None:
        """Write a histogram of each layer's experts, and a heat map of all."""
        found = {
            f"expert_load/{name}": self._wandb.Histogram(load_E) for name, load_E in loads.items()
        }
        if loads:
            found["expert_load/all"] = self._wandb.Image(heat_map(loads))
        self._send(found, step)

    def event(self, row: Row) -> None:
        """Do nothing: an event is no value of a step."""

    def rewind(self, step: int) -> None:
        """Keep the first values of repeated steps, as at a resume."""
        self._first_step = max(self._first_step, int(self._run.step) + 1)

    def close(self) -> None:
        """Upload the remaining values."""
        self._run.finish()

    def _log(self, prefix: str, row: Row) -> None:
        self._send({f"{prefix}/{name}": value for name, value in flat(row)}, row["step"])

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        if step >= self._first_step:  # wandb would drop an earlier one with a warning
            self._run.log(values, step=step)


def heat_map(loads: Loads) -> np.ndarray:
    """Return the load of every expert as an image, uint8 [height, width, RGB]."""
    from moetron.moe.monitoring import heat_map  # matplotlib: half a second of imports

    return heat_map.pixels(heat_map.draw(loads))


def flat(row: Row) -> list[tuple[str, float]]:
    """Return (name, value) of every number but the step; nested names as ``outer/inner``."""
    pairs: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            pairs += [(f"{name}/{inner}", number) for inner, number in flat(value)]
        elif name != "step" and isinstance(value, int | float):
            pairs.append((name, value))
    return pairs


def open_sinks(settings: Settings, last_step: int) -> list[Sink]:
    """Open the sinks of --save and the logging settings; steps after ``last_step`` are repeated."""
    sinks: list[Sink] = []
    logging, save = settings.logging, settings.checkpoint.save
    if save is None:
        return sinks
    folder = Path(save)
    sinks.append(LineFiles(folder, last_step))
    if logging.tensorboard:
        sinks.append(
            TensorBoard(Path(logging.tensorboard_dir or folder / "tensorboard"), last_step)
        )
    if logging.wandb_project is not None:
        sinks.append(WandB(folder, last_step, settings))
    return sinks
