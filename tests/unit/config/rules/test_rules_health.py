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
