"""The health of a run: one object that step and loop ask."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from moetron.common.errors import UserError
from moetron.common.json_files import read_object
from moetron.moe.config.schema.settings import Settings
from moetron.moe.health.expert_alarms import ExpertAlarms, ExpertState, Loads, spread_of
from moetron.moe.health.gradients import GradientNorm
from moetron.moe.health.rerun import Reruns
from moetron.moe.health.spikes import Place, SpikeDetector, SpikeState, StepValues, Verdict
from moetron.moe.routing.router import Router

FILE = "health.json"
"""File of a checkpoint with the state below."""


class HealthState(BaseModel):
    """State of a `HealthMonitor`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    spikes: SpikeState = SpikeState()
    experts: ExpertState = ExpertState()


class HealthMonitor:
    """Judge of every step, with what a refused update has to restore.

    Args:
        settings: the run's.
        chunks: the model on this rank.
        config: megatron-core's, whose callback that finalises gradients is wrapped.
    """

    def __init__(self, settings: Settings, chunks: Sequence[torch.nn.Module], config: Any) -> None:
        check_finite = settings.training.check_for_nan_in_loss_and_grad
        self._topk = settings.moe.moe_router_topk
        self._spikes = SpikeDetector(settings.health, check_finite)
        self._experts = ExpertAlarms(settings.health, self._topk)
        self.gradients = GradientNorm.install(config, settings)
        self._routers = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, Router) and module.enable_expert_bias
        ]
        self.reruns = Reruns(settings.health, chunks)
        self._keeps_biases = settings.health.spike_policy == "skip"
        self._biases: list[torch.Tensor] = []
        self._place = Place(0, 0, 0)
        self.verdict = Verdict()
        self.metrics: dict[str, float] = {}

    def begin(self, place: Place) -> None:
        """Start a step; keep what its backward pass changes."""
        self._place = place
        self.reruns.begin()
        if self._keeps_biases:
            # The bias of experts moves when gradients are finalised, before the decision.
            self._biases = [router.expert_bias.clone() for router in self._routers]

    def runs_again(self, values: StepValues) -> bool:
        """Return whether the passes of the step are to be run again, from the same state.

        Collective with --rerun-mode; all ranks get the same answer.
        """
        return self.reruns.again(self._place, values, *self._spikes.preview(values))

    def judge(self, values: StepValues, loads: Loads, bias_ranges: Mapping[str, float]) -> Verdict:
        """Decide on the step, before the update; all arguments are equal on all ranks.

        If it is to be skipped, weights, optimizer state and expert biases stay as they were.
        """
        verdict, self.metrics = self._spikes.judge(self._place, values)
        alarms = self._experts.judge(self._place.step, loads, bias_ranges)
        self.verdict = Verdict(verdict.action, [*verdict.events, *alarms])
        self.metrics |= self.reruns.metrics
        if loads:
            spreads = [spread_of(load_E, self._topk) for load_E in loads.values()]
            self.metrics["router_entropy"] = min(spreads)
        if bias_ranges:
            self.metrics["expert_bias_range"] = max(bias_ranges.values())
        if verdict.action == "skip":
            with torch.no_grad():
                for router, bias_E in zip(self._routers, self._biases, strict=True):
                    router.expert_bias.copy_(bias_E)
        return self.verdict

    @property
    def rollbacks(self) -> int:
        """Return the rollbacks of the run so far."""
        return self._spikes.rollbacks

    @rollbacks.setter
    def rollbacks(self, count: int) -> None:
        self._spikes.rollbacks = count

    def state(self) -> str:
        """Return the state as JSON; floats keep every bit."""
        state = HealthState(spikes=self._spikes.state(), experts=self._experts.state())
        return state.model_dump_json()

    def restore(self, folder: Path) -> None:
        """Continue from the state in a checkpoint's folder; older checkpoints have none.

        Raises:
            UserError: the file is damaged.
        """
        path = folder / FILE
        state = HealthState()
        if path.is_symlink():
            raise UserError(f"{path}: damaged: leads out of the folder")
        if path.is_file():
            try:
                state = HealthState.model_validate(read_object(path))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise UserError(f"{path}: damaged: {where}: {first['msg']}") from None
        self._spikes.restore(state.spikes)
        self._experts.restore(state.experts)
