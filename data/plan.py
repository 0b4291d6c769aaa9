"""From what the settings say about data to the streams of a run."""

from collections.abc import Sequence
from typing import Protocol

from moetron.data.objectives.build import ObjectiveName, ObjectivePlan, build_objective
from moetron.data.repetition import RepetitionFilter
from moetron.data.stages import Stage, StagedStream
from moetron.data.stream import TokenStream, validation_stream
from moetron.tokenizers.interface import Tokenizer


class StagePlan(Protocol):
    """One stage."""

    data_path: list[str]
    until_tokens: int | None
    objective: ObjectiveName
    seed: int | None


class DataPlan(ObjectivePlan, Protocol):
    """What settings say about data; see ``--help``."""

    eod_mask_loss: bool
    repetition_max_count: int | None
    repetition_max_period: int

    def planned_stages(self) -> Sequence[StagePlan]:
        """At least one stage."""
        ...

    def rooted(self, data_path: Sequence[str]) -> list[str]:
        """A data path with its prefixes where they lie."""
        ...


def open_training(plan: DataPlan, seq_length: int, seed: int, tokenizer: Tokenizer) -> StagedStream:
    """The stages of a run one after the other.

    Raises:
        DataError: a shard cannot be used, or an objective does not fit tokenizer or length.
    """
    stages = [
        Stage(
            plan.rooted(stage.data_path),
            build_objective(stage.objective, seq_length, tokenizer, plan),
            seed if stage.seed is None else stage.seed,
            stage.until_tokens,
        )
        for stage in plan.planned_stages()
    ]
    count, period = plan.repetition_max_count, plan.repetition_max_period
    repetition = None if count is None else RepetitionFilter(count, period)
    return StagedStream(stages, seq_length, plan.eod_mask_loss, tokenizer.fingerprint, repetition)


def open_validation(
    plan: DataPlan, data_path: Sequence[str], seq_length: int, tokenizer: Tokenizer
) -> TokenStream:
    """Every window of the validation shards once, with the objective of the last stage."""
    last = plan.planned_stages()[-1].objective
    return validation_stream(
        plan.rooted(data_path),
        seq_length,
        plan.eod_mask_loss,
        tokenizer.fingerprint,
        build_objective(last, seq_length, tokenizer, plan),
    )
