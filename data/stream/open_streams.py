"""Open the training and validation streams that the settings describe."""

import re
from collections.abc import Sequence
from typing import Protocol

from moetron.common.data_path import split_data_path
from moetron.common.errors import UserError
from moetron.data.objectives.build_objective import ObjectiveName, ObjectivePlan, build_objective
from moetron.data.objectives.objective import Objective
from moetron.data.stream.blend import source_name
from moetron.data.stream.repetition import RepetitionFilter
from moetron.data.stream.stages import Stage, StagedStream
from moetron.data.stream.token_stream import TokenStream, validation_stream
from moetron.tokenizers.interface import Tokenizer

_HELD_OUT = re.compile(r"[._-](valid|validation|val|heldout|holdout|test)$")
"""Suffix that a validation shard adds to the name of its source."""


class StagePlan(Protocol):
    """Settings of one stage."""

    data_path: list[str]
    until_tokens: int | None
    objective: ObjectiveName
    seed: int | None


class DataPlan(ObjectivePlan, Protocol):
    """Data settings; see ``--help``."""

    fim_sources: list[str] | None
    eod_mask_loss: bool
    repetition_max_count: int | None
    repetition_max_period: int

    def planned_stages(self) -> Sequence[StagePlan]:
        """Return at least one stage."""
        ...

    def rooted(self, data_path: Sequence[str]) -> list[str]:
        """Return a data path with its prefixes resolved against the data root."""
        ...


def open_training(plan: DataPlan, seq_length: int, seed: int, tokenizer: Tokenizer) -> StagedStream:
    """Open the consecutive stages of a run.

    Raises:
        UserError: a shard cannot be used, an objective does not fit tokenizer or length, or
        ``fim_sources`` names a source of no stage with that objective.
    """
    _refuse_unknown_fim_sources(plan)
    stages = []
    for stage in plan.planned_stages():
        objective, own = _objectives(plan, stage.objective, seq_length, tokenizer)
        stage_seed = seed if stage.seed is None else stage.seed
        path = plan.rooted(stage.data_path)
        stages.append(Stage(path, objective, stage_seed, stage.until_tokens, own))
    count, period = plan.repetition_max_count, plan.repetition_max_period
    repetition = None if count is None else RepetitionFilter(count, period)
    return StagedStream(stages, seq_length, plan.eod_mask_loss, tokenizer.fingerprint, repetition)


def open_validation(
    plan: DataPlan,
    data_path: Sequence[str],
    seq_length: int,
    tokenizer: Tokenizer,
    at_most: int | None = None,
) -> TokenStream:
    """Open every window of the validation shards once, with the last stage's objectives by source.

    With ``at_most`` so many windows, spread evenly over all. ``code.valid``, ``code_valid`` and the
    like count as ``code``, unless training has that source.
    """
    last = plan.planned_stages()[-1].objective
    objective, own = _objectives(plan, last, seq_length, tokenizer)
    trained = {n for stage in plan.planned_stages() for n in _names(stage.data_path)}
    for name in _names(data_path):
        belongs_to = _HELD_OUT.sub("", name)
        if name not in trained and belongs_to in own:
            own[name] = own[belongs_to]
    return validation_stream(
        plan.rooted(data_path),
        seq_length,
        plan.eod_mask_loss,
        tokenizer.fingerprint,
        objective,
        own,
        at_most,
    )


def _names(data_path: Sequence[str]) -> list[str]:
    """Return the source names of a data path."""
    return [source_name(prefix) for prefix in split_data_path(data_path)[1]]


def _objectives(
    plan: DataPlan, name: ObjectiveName, seq_length: int, tokenizer: Tokenizer
) -> tuple[Objective, dict[str, Objective]]:
    """Return a stage's objective, and by source name the objectives that differ from it."""
    objective = build_objective(name, seq_length, tokenizer, plan)
    if name != "fim" or plan.fim_sources is None:
        return objective, {}
    rest = build_objective("causal", seq_length, tokenizer, plan)
    return rest, dict.fromkeys(plan.fim_sources, objective)


def _refuse_unknown_fim_sources(plan: DataPlan) -> None:
    """Raise UserError for ``fim_sources`` that no stage with infilling reads."""
    paths = [stage.data_path for stage in plan.planned_stages() if stage.objective == "fim"]
    if plan.fim_sources and not paths:
        raise UserError(f"--fim-sources {' '.join(plan.fim_sources)}: needs --objective fim")
    known = dict.fromkeys(name for path in paths for name in _names(path))
    if unknown := [name for name in plan.fim_sources or [] if name not in known]:
        raise UserError(
            f"--fim-sources {' '.join(unknown)}: no such source in a stage with the objective fim; "
            f"available: {', '.join(known)}"
        )
