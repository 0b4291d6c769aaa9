"""Reruns of a step with bad values: is a device faulty, or are the data bad?

megatron-core's state machine decides (megatron/core/rerun_state_machine.py, experimental there).
Values that do not come back on the same data and device are a transient fault. If they come back,
the job saves, ends with code 16 and runs the step again after its restart: other values on another
device show a persistent fault of the first one, the same ones bad data; code 17.

What megatron-core would put into a checkpoint is pickled objects and micro-batches. Here samples
are read again by their numbers, and the rest is JSON next to the checkpoints.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import (
    Call,
    Caller,
    RerunDiagnostic,
    RerunErrorInjector,
    RerunMode,
    RerunState,
    RerunStateMachine,
    RerunValidationStatus,
)
from pydantic import BaseModel, ConfigDict, ValidationError

from moetron.common.errors import RunError, UserError
from moetron.common.files import write_text
from moetron.common.json_files import read_object
from moetron.moe.config.schema.run import HealthSettings
from moetron.moe.health.events import Event
from moetron.moe.health.spikes import Place, StepValues, standing_out
from moetron.moe.health.step_state import StepState

logger = logging.getLogger(__name__)

FILE = "rerun.json"
"""File in a run's folder, while a step waits for its rerun on another device."""
_MESSAGE = "values of the step"
_DIFFERS = (
    RerunValidationStatus.FIRST_RERUN_NOT_REPRODUCIBLE,
    RerunValidationStatus.SECOND_RERUN_NOT_REPRODUCIBLE,
)


class RerunError(RunError):
    """The run ends after reruns of a step, with Megatron's exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class RankRecord(BaseModel):
    """What a rank knows of the first runs of a step."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    node: str | None
    device: str | None
    """None: its values did not stand out."""
    values: list[str]
    """Values of the first run as text; empty if they did not stand out."""
    injected: str | None
    """Injected error, of a drill."""


class RerunRecord(BaseModel):
    """Content of `FILE`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    step: int
    """Steps of the checkpoint to resume from."""
    ranks: list[RankRecord]


@dataclass(frozen=True)
class Ending:
    """End of the run after a rerun."""

    exit_code: int
    saves: bool
    """Whether the state before the step is saved."""
    text: str


class Machine(RerunStateMachine):
    """megatron-core's machine on any device; `status` is the last finding of this rank."""

    failed_validation_call: Call | None
    initial_result: list[float] | None
    suspicious_node: str | None
    suspicious_device: Any

    def __init__(self, settings: HealthSettings, device: torch.device, state: StepState) -> None:
        # Each rank would log each finding in several lines; events say it once.
        logging.getLogger(rerun_state_machine.__name__).setLevel(logging.CRITICAL)
        injector = RerunErrorInjector(
            settings.error_injection_rate, RerunDiagnostic(settings.error_injection_type)
        )
        super().__init__(state.save, state.restore, RerunMode(settings.rerun_mode), injector)
        self._flags_device = device
        self.status: RerunValidationStatus | None = None

    def _reduce_any(self, value: Any) -> Any:
        flags = torch.tensor(value, dtype=torch.int32, device=self._flags_device)
        # All-reduce over all ranks: what one rank asks for happens on all of them.
        dist.all_reduce(flags)
        found = (flags > 0).tolist()
        return tuple(found) if isinstance(found, list) else found

    def _log_validation_error_to_file(
        self, status: RerunValidationStatus, result: Any, message: str
    ) -> None:
        self.status = status

    def _maybe_report_stats(self) -> None:
        """Do nothing: that of megatron-core 0.16.1 reads fields that `Caller` has lost."""

    def forget(self) -> None:
        """Forget what an earlier step has shown, which megatron-core keeps."""
        self.status = None
        if self.state == RerunState.NOT_RUNNING_YET:
            self.failed_validation_call, self.initial_result = None, None
            self.suspicious_node, self.suspicious_device = None, None

    def resume(self, rank: int, record: RankRecord) -> None:
        """Continue where the job before the restart ended."""
        self.state = RerunState.WILL_RERUN_FROM_CHECKPOINT
        if record.injected is not None:
            self.error_injector.injected_error_type = RerunDiagnostic(record.injected)
        if record.device is not None:
            self.failed_validation_call = Call(Caller(_MESSAGE, rank), 1)
            self.initial_result = [float(text) for text in record.values]
            self.suspicious_node = record.node
            here = torch.cuda.current_device()
            self.suspicious_device = here if str(here) == record.device else -1

    def record(self) -> RankRecord:
        """Return what `resume` needs."""
        injected = self.error_injector.injected_error_type
        suspected, values = self.suspicious_node is not None, self.initial_result or []
        return RankRecord(
            node=self.suspicious_node if suspected else None,
            device=str(self.suspicious_device) if suspected else None,
            values=list(map(repr, values)) if suspected else [],
            injected=None if injected is None else injected.value,
        )


class Reruns:
    """Whether and why the passes of a step are run again.

    Args:
        settings: the run's.
        chunks: the model on this rank.
    """

    def __init__(self, settings: HealthSettings, chunks: Sequence[torch.nn.Module]) -> None:
        self._tolerance = settings.rerun_tolerance
        self._reports = settings.rerun_mode == "report_determinism_stats"
        self._machine: Machine | None = None
        if settings.rerun_mode != "disabled":
            device = next(chunks[0].parameters()).device
            self._machine = Machine(settings, device, StepState(chunks))
        self._first: StepValues | None = None
        self._fatal = False
        self.events: list[Event] = []
        self.metrics: dict[str, float] = {}
        self.ending: Ending | None = None

    @property
    def enabled(self) -> bool:
        """Return whether steps may be run again."""
        return self._machine is not None

    def begin(self) -> None:
        """Start a step."""
        self.events, self.metrics, self._first = [], {}, None
        if self._machine is not None:
            self._machine.forget()
            assert self._machine.should_run_forward_backward(None)

    def again(self, place: Place, values: StepValues, bad: bool, fatal: bool) -> bool:
        """Return whether the passes are to be run again, from the same state; collective.

        Args:
            place: the step.
            values: of its passes, equal on all ranks.
            bad: whether they are refused.
            fatal: whether refused values end the run; those of the first run count.
        """
        machine = self._machine
        if machine is None:
            return False
        rank, ranks = dist.get_rank(), standing_out(values)
        suspected = bad and (not ranks or rank in ranks)
        state = machine.state
        if state != RerunState.RERUNNING_IN_PLACE:
            self._fatal = fatal
        own = _own(values, rank)
        machine.validate_result(
            own, lambda _: suspected, _MESSAGE, difference, self._tolerance, self._fatal
        )
        if machine.should_run_forward_backward(None):
            self._first = values
            return True
        ends = machine.should_checkpoint_and_exit()
        if self._reports:
            assert self._first is not None
            pairs = [(_own(self._first, r), _own(values, r)) for r in range(dist.get_world_size())]
            self.metrics["rerun_difference"] = max(difference(*pair) for pair in pairs)
        elif state != RerunState.INITIAL_RUN:
            self._conclude(place, values, state, ends)
        return False

    def _conclude(
        self, place: Place, values: StepValues, state: RerunState, ends: tuple[bool, bool, int]
    ) -> None:
        """Make the event and the ending of a step that was run again; collective."""
        machine = self._machine
        assert machine is not None
        _, exits, code = ends
        # After a fault megatron-core 0.16 saves too, 0.19 does not: its device may have damaged
        # more than gradients.
        saves = machine.state == RerunState.WILL_RERUN_FROM_CHECKPOINT
        mine = None
        if machine.failed_validation_call is not None:
            elsewhere = state == RerunState.RERUNNING_FROM_CHECKPOINT
            node = machine.suspicious_node if elsewhere else os.uname()[1]
            mine = (machine.status, node, machine.restart_again_requested)
        found: list[Any] = [None] * dist.get_world_size()
        # Gather over all ranks, only after a rerun: who was suspected, and what was found.
        dist.all_gather_object(found, mine)
        suspects = {rank: each for rank, each in enumerate(found) if each is not None}
        kind, text = _finding(suspects, state, code)
        ranks = ", ".join(f"{rank} on {node}" for rank, (_, node, _) in suspects.items())
        text = f"{text} (rank{'s' if len(suspects) > 1 else ''} {ranks})"
        shown = {"loss": values.loss, "grad_norm": values.grad_norm}
        if self._first is not None:
            shown |= {"first_loss": self._first.loss, "first_grad_norm": self._first.grad_norm}
        if exits:
            text += f"; exit code {code}"
            self.ending = Ending(code, saves, f"step {place.step}: {text}")
        samples = (place.first_sample, place.end_sample)
        action = "stop" if exits else "warn"
        self.events = [Event(place.step, kind, action, text, samples, [], list(suspects), shown)]

    def write(self, folder: Path, step: int) -> None:
        """Write the record of a step that waits for its rerun on another device; collective."""
        machine = self._machine
        if machine is None or machine.state != RerunState.WILL_RERUN_FROM_CHECKPOINT:
            return
        records: list[Any] = [None] * dist.get_world_size()
        # Gather over all ranks, once: rank 0 alone writes the file.
        dist.all_gather_object(records, machine.record())
        if dist.get_rank() == 0:
            record = RerunRecord(step=step, ranks=records)
            write_text(folder / FILE, json.dumps(record.model_dump()))

    def resume(self, folder: Path, step: int) -> None:
        """Continue the search in a job that was restarted from the checkpoint of ``step``.

        Raises:
            UserError: the file is damaged.
        """
        if self._machine is None or self._reports:
            return
        found: list[RerunRecord | None] = [None]
        if dist.get_rank() == 0:
            found = [_read(folder / FILE)]
        # Broadcast from rank 0, which alone reads the file.
        dist.broadcast_object_list(found, src=0)
        [record] = found
        if record is None or record.step != step:
            return
        if len(record.ranks) != dist.get_world_size():
            if dist.get_rank() == 0:
                text = "%s is of %d ranks: the step after the checkpoint is not compared"
                logger.warning(text, folder / FILE, len(record.ranks))
            return
        self._machine.resume(dist.get_rank(), record.ranks[dist.get_rank()])


def _read(path: Path) -> RerunRecord | None:
    if path.is_symlink():
        raise UserError(f"{path}: damaged: leads out of the folder")
    if not path.is_file():
        return None
    try:
        return RerunRecord.model_validate(read_object(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: damaged: {where}: {first['msg']}") from None


def _own(values: StepValues, rank: int) -> list[float]:
    """Return what two runs of a step are compared by: values of all ranks, and of one."""
    norms = values.rank_grad_norms
    own = [values.rank_losses[rank], norms[rank] if norms else None]
    return [values.loss, values.grad_norm, *(each for each in own if each is not None)]


def difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the largest relative difference of two runs' values; equal NaN and infinity are 0."""
    return max(_relative(a, b) for a, b in zip(first, second, strict=True))


def _relative(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _finding(suspects: dict[int, Any], state: RerunState, code: int) -> tuple[str, str]:
    """Return kind and text of what reruns have shown; kinds are Megatron's diagnostics."""
    differs = any(status in _DIFFERS for status, _, _ in suspects.values())
    if state == RerunState.RERUNNING_IN_PLACE:
        if differs and code != rerun_state_machine.EXIT_CODE_RESUME_TO_DISAMBIGUATE:
            text = "run again on the same data, its values are others: a transient fault"
            return "transient_error", text
        text = "run again, its values are the same: bad data, or a persistent fault of a device"
        return "reproducible_result", text
    if any(again for _, _, again in suspects.values()):
        text = "the job came back to the same device; restart it on another one"
        return "reproducible_result", text
    if differs:
        return "persistent_error", "its values are others on another device: a persistent fault"
    return "correct_result", "its values are the same on another device: bad data, no fault"
