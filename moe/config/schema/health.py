"""Settings of health checks: spikes, replicas, experts."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moetron.moe.config.schema.field import Group
from moetron.moe.config.schema.roles import Role, Run

SpikePolicy = Literal["warn", "skip", "stop", "rollback"]


class HealthSettings(Group):
    """Checks of losses, gradients, replicas and experts; events go to SAVE/events.jsonl."""

    default_role = Role.TRAINING

    spike_policy: SpikePolicy = "warn"
    """At a spike of loss or gradient norm: warn, skip the update, stop, or roll back to a
    checkpoint and leave out the samples since. Values that are not finite stop a run under warn."""
    spike_window: int = Field(default=128, ge=4)
    """Steps whose mean and deviation a loss or gradient norm is compared with (from half of them
    on)."""
    spike_threshold: PositiveFloat = 6.0
    """Standard deviations above the mean that make a spike."""
    spike_grad_norm_ratio: PositiveFloat = 4.0
    """A gradient norm is a spike only above this multiple of the mean: norms have heavy tails."""
    spike_max_skips: PositiveInt = 10
    """skip: updates skipped in a row before the run stops."""
    spike_max_rollbacks: PositiveInt = 3
    """rollback: rollbacks of a run before it stops."""
    spike_rollback_checkpoints: PositiveInt = 1
    """rollback: checkpoints to go back; 1 is the latest. Later ones are deleted."""
    check_weight_hash_across_dp_replicas_interval: Run[PositiveInt | None] = None
    """Steps between comparisons of parameter hashes over data-parallel replicas; a difference names
    the ranks and stops the run."""
    expert_alarm_steps: Run[PositiveInt | None] = 200
    """Consecutive steps after which an expert without tokens, or a bound below that is exceeded,
    raises an alarm; null: no alarms."""
    expert_alarm_load: Run[PositiveFloat] = 4.0
    """Alarm: load of a layer's fullest expert over the mean load above this."""
    expert_alarm_max_violation: Run[PositiveFloat] = 3.0
    """Alarm: MaxVio, the mean over layers of (fullest expert over mean load) - 1, above this."""
    expert_alarm_entropy: Run[float] = Field(default=0.5, ge=0, lt=1)
    """Alarm: entropy of a layer's choices below this, 0: the same top-k experts for every token, 1:
    uniform load."""
    expert_alarm_bias_range: Run[PositiveFloat] = 1.0
    """Alarm: range of a layer's expert biases above this; scores have a range of 1."""
