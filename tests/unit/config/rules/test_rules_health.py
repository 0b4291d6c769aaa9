"""Rules on health checks."""

from typing import Any

import pytest

from tests.unit.config.config_cases import found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"spike_policy": "rollback"}, "--spike-policy rollback needs checkpoints: add --save"),
        (
            {"spike_policy": "rollback", "save": "/tmp/run", "save_interval": None},
            "add --save and --save-interval",
        ),
        (
            {
                "spike_policy": "rollback",
                "save": "/tmp/run",
                "save_interval": 5,
                "keep_last": 1,
                "spike_rollback_checkpoints": 2,
            },
            "--spike-rollback-checkpoints 2 with --keep-last 1: older checkpoints are deleted; use "
            "--keep-last 2",
        ),
    ],
)
def test_rollback_needs_checkpoints(changes: dict[str, Any], expected: str) -> None:
    [problem] = found(**changes)
    assert expected in problem


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rerun_mode": "validate_results"}, "add --save"),
        ({"rerun_mode": "report_determinism_stats"}, None),
        ({"rerun_mode": "validate_results", "save": "/tmp/run"}, None),
        ({"error_injection_rate": 9}, "needs --rerun-mode validate_results"),
        (
            {"rerun_mode": "report_determinism_stats", "fp8_format": "e4m3"},
            "--fp8-recipe delayed: a rerun would find other scales",
        ),
    ],
)
def test_reruns(changes: dict[str, Any], expected: str | None) -> None:
    problems = found(**changes)
    assert [expected in problem for problem in problems] == ([] if expected is None else [True])
