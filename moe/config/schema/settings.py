"""Settings tree of a run."""

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from moetron.moe.config.schema.attention import AttentionSettings
from moetron.moe.config.schema.data import AdaptationSettings, DataSettings
from moetron.moe.config.schema.experts import MoESettings
from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.model import ModelSettings
from moetron.moe.config.schema.parallel import ParallelSettings
from moetron.moe.config.schema.performance import PerformanceSettings
from moetron.moe.config.schema.precision import PrecisionSettings
from moetron.moe.config.schema.roles import Role, is_exported, role_of
from moetron.moe.config.schema.run import (
    CheckpointSettings,
    HealthSettings,
    LearningRateSettings,
    LoggingSettings,
    OptimizerSettings,
    ProfilingSettings,
    TrainingSettings,
    ValidationSettings,
    WatchSettings,
)


class Settings(Group):
    """Settings of a run, in the groups of recipes and ``--help``."""

    model: ModelSettings
    attention: AttentionSettings = AttentionSettings()
    moe: MoESettings = MoESettings()
    parallel: ParallelSettings = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    performance: PerformanceSettings = PerformanceSettings()
    training: TrainingSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    learning_rate: LearningRateSettings
    data: DataSettings = DataSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    health: HealthSettings = HealthSettings()
    logging: LoggingSettings = LoggingSettings()
    profiling: ProfilingSettings = ProfilingSettings()
    watch: WatchSettings = WatchSettings()


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield (group, name, field) of every setting; names are unique over all groups."""
    for group_name, group in Settings.model_fields.items():
        assert group.annotation is not None
        for name, field in group.annotation.model_fields.items():
            yield group_name, name, field


def _role(group: str, field: FieldInfo) -> Role:
    kind = Settings.model_fields[group].annotation
    assert kind is not None
    return role_of(field, kind.default_role)


ROLES = {(group, name): _role(group, field) for group, name, field in fields()}
"""Role of every setting, by group and name."""
EXPORTED = frozenset(
    (group, name) for group, name, field in fields() if is_exported(field, ROLES[group, name])
)
"""Settings that a converted model shows."""


def with_role(role: Role) -> dict[str, tuple[str, ...]]:
    """Return the names of the settings with a role, by group."""
    found: dict[str, tuple[str, ...]] = {}
    for group, name, _ in fields():
        if ROLES[group, name] is role:
            found[group] = (*found.get(group, ()), name)
    return found
