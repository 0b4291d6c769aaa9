"""Rules on health checks."""

from collections.abc import Iterator

from moetron.moe.config.rules.case import Case


def rollback(case: Case) -> Iterator[str]:
    """Check that a rollback has checkpoints to return to."""
    health, checkpoint = case.settings.health, case.settings.checkpoint
    if health.spike_policy != "rollback":
        return
    if checkpoint.save is None or checkpoint.save_interval is None:
        yield "--spike-policy rollback needs checkpoints: add --save and --save-interval"
    back, kept = health.spike_rollback_checkpoints, checkpoint.keep_last
    if kept is not None and kept < back:
        yield (
            f"{case.given('spike_rollback_checkpoints')} with {case.given('keep_last')}: older "
            f"checkpoints are deleted; use --keep-last {back} or more"
        )


RULES = (rollback,)
"""Rules of this module."""
