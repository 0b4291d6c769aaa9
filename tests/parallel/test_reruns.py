"""Steps with bad values that are run again: faulty devices and bad data, on all ranks alike."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moetron.moe.checkpoint.run_folder import latest_step, saved_steps, step_folder
from moetron.moe.health.events import read_events
from moetron.moe.health.rerun import FILE, RerunError
from tests.parallel.support.checkpoint_runs import metrics, parallel_of, settings, start, tensors
from tests.parallel.support.harness import run_each, run_ranks

FAULTY = 6
"""Step with a bad gradient on rank 1."""
LAST = 8
MODEL: dict[str, dict[str, Any]] = {
    "model": {"attention_dropout": 0.1},  # from the tracker of random states
    "moe": {
        "moe_router_enable_expert_bias": True,
        "moe_router_score_function": "sigmoid",
        "moe_input_jitter_eps": 0.01,
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_global_aux_loss_counts": "previous_step",
    },
}


def _run(folder: str, host: str, passes: list[int], health: dict[str, Any]) -> dict[str, Any]:
    """Train on a host of that name; a gradient is NaN in ``passes`` of the faulty step."""
    chosen = settings(
        "ep2_zero",
        **MODEL,
        training={"train_iters": LAST},
        checkpoint={"save": folder, "load": folder, "save_interval": 4},
        health=health,
    )
    done = [0]
    node = os.uname_result(("Linux", host, "", "", ""))
    with parallel_of(chosen), patch("os.uname", lambda: node):
        loop = start(chosen)

        def spoil(grad: torch.Tensor) -> torch.Tensor:
            if loop.progress.step != FAULTY - 1:
                return grad
            done[0] += 1  # two micro-batches of a rank in each pass
            return grad * float("nan") if (done[0] - 1) // 2 in passes else grad

        if torch.distributed.get_rank() == 1:
            list(loop.trainer.chunks[0].parameters())[-1].register_hook(spoil)
        try:
            loop.run(lambda: False)
        except RerunError as error:
            return {"code": error.exit_code, "text": str(error)}
        return {"code": 0, "text": ""}


VALIDATES = {"rerun_mode": "validate_results"}


def _events(folder: Path) -> list[tuple[int, str, str, list[int]]]:
    rows = read_events(folder / "events.jsonl")
    return [(row["step"], row["kind"], row["action"], row["ranks"]) for row in rows]


def _equal(one: Path, other: Path, step: int) -> bool:
    found = [tensors(step_folder(folder, step), states=True) for folder in (one, other)]
    return found[0].keys() == found[1].keys() and all(
        torch.equal(found[0][key], found[1][key]) for key in found[0]
    )


def test_a_transient_fault(tmp_path: Path) -> None:
    """The run ends with code 17 and resumes, or continues as if nothing had happened."""
    plain, ends, goes_on = (tmp_path / name for name in ("plain", "ends", "goes_on"))
    calls = [
        (str(plain), "a", [], {}),
        (str(ends), "a", [0], VALIDATES),
        (str(ends), "a", [], VALIDATES),
        (str(goes_on), "a", [0], {**VALIDATES, "spike_policy": "skip"}),
    ]
    _, ended, resumed, went_on = run_each(_run, 2, calls)
    assert [rank["code"] for rank in ended] == [17, 17]
    assert "a transient fault (rank 1 on a); exit code 17" in ended[0]["text"]
    assert saved_steps(ends) == [4, 8]
    assert not (ends / FILE).exists()
    assert [rank["code"] for rank in resumed + went_on] == [0] * 4
    assert _events(ends) == [(FAULTY, "transient_error", "stop", [1])]
    assert _events(goes_on) == [(FAULTY, "transient_error", "warn", [1])]
    assert metrics(ends) == metrics(goes_on) == metrics(plain)
    assert _equal(plain, ends, LAST) and _equal(plain, goes_on, LAST)


@pytest.mark.parametrize(
    ("host", "passes", "code", "kind", "text"),
    [
        ("b", [], 17, "persistent_error", "a persistent fault (rank 1 on a); exit code 17"),
        ("b", [0, 1, 2], 17, "correct_result", "bad data, no fault"),
        ("a", [0, 1, 2], 16, "reproducible_result", "came back to the same device"),
    ],
)
def test_values_that_come_back_are_compared_on_another_device(
    tmp_path: Path, host: str, passes: list[int], code: int, kind: str, text: str
) -> None:
    calls = [
        (str(tmp_path), "a", [0, 1], VALIDATES),
        (str(tmp_path), host, passes, VALIDATES),
    ]
    first, second = run_each(_run, 2, calls)
    assert [rank["code"] for rank in first] == [16, 16]
    assert latest_step(tmp_path) == FAULTY - 1
    assert (tmp_path / FILE).is_file()
    assert [rank["code"] for rank in second] == [code] * 2
    assert text in second[0]["text"]
    assert _events(tmp_path)[-1] == (FAULTY, kind, "stop", [1])
    [rows] = [metrics(tmp_path)]
    assert [row["step"] for row in rows] == list(range(1, FAULTY))


def test_bad_data_that_the_policy_skips_need_no_restart(tmp_path: Path) -> None:
    health = {**VALIDATES, "spike_policy": "skip"}
    assert [rank["code"] for rank in run_ranks(_run, 2, str(tmp_path), "a", [0, 1], health)] == [
        0
    ] * 2
    assert _events(tmp_path) == [
        (FAULTY, "reproducible_result", "warn", [1]),
        (FAULTY, "non_finite", "skip", [1]),
    ]
    assert metrics(tmp_path)[-1]["step"] == LAST


@pytest.mark.parametrize(
    ("kind", "codes"),
    [("transient_error", [17]), ("persistent_error", [16, 17]), ("correct_result", [16, 17])],
)
def test_drills(tmp_path: Path, kind: str, codes: list[int]) -> None:
    """Injected in the second step, the first that is checked."""
    health = {**VALIDATES, "error_injection_rate": 1, "error_injection_type": kind}
    calls = [(str(tmp_path), host, [], health) for host in "ab"[: len(codes)]]
    found = list(run_each(_run, 2, calls))
    assert [[rank["code"] for rank in ranks] for ranks in found] == [[code] * 2 for code in codes]
    assert _events(tmp_path)[-1] == (2, kind, "stop", [0, 1])


def test_two_runs_of_every_step_are_alike(tmp_path: Path) -> None:
    """Dropout, jitter, counts of choices and biases included; the run does not change."""
    plain, twice = tmp_path / "plain", tmp_path / "twice"
    calls = [
        (str(plain), "a", [], {}),
        (str(twice), "a", [], {"rerun_mode": "report_determinism_stats"}),
    ]
    list(run_each(_run, 2, calls))
    rows = metrics(twice)
    assert [row.pop("rerun_difference") for row in rows] == [0.0] * LAST
    assert rows == metrics(plain)
    assert _equal(plain, twice, LAST)
