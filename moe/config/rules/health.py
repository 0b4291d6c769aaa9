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


def reruns(case: Case) -> Iterator[str]:
    """Check that the passes of a step can be run again, and that the run can end and resume."""
    settings, health = case.settings, case.settings.health
    if health.rerun_mode != "validate_results" and health.error_injection_rate:
        yield f"{case.given('error_injection_rate')} needs --rerun-mode validate_results"
    if health.rerun_mode == "disabled":
        return
    mode = case.given("rerun_mode")
    if health.rerun_mode == "validate_results" and settings.checkpoint.save is None:
        yield f"{mode} saves a checkpoint before it ends a run: add --save"
    if settings.performance.cuda_graph_impl != "none":
        yield f"{mode} is incompatible with {case.given('cuda_graph_impl')}: use none"
    precision = settings.precision
    if precision.fp8_format is not None and precision.fp8_recipe == "delayed":
        yield (
            f"{mode} with {case.given('fp8_recipe')}: a rerun would find other scales; use another "
            "--fp8-recipe"
        )


RULES = (rollback, reruns)
"""Rules of this module."""
