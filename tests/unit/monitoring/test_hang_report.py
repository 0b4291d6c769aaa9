"""Which ranks hold up a job, from their signs of life."""

import sys
from pathlib import Path

import pytest

from moetron.common.watch import activity
from moetron.moe.monitoring.hang_report import Status, culprits, describe, place_of, ranks_text
from moetron.moe.monitoring.watchdog import Watchdog
from tests.parallel.support.checkpoint_runs import settings


def status(number: int = 5, place: str = "all_reduce of a.py:1 (f)", waits: bool = True) -> Status:
    return Status(9, "step", number, number, 70.0, place, waits)


@pytest.mark.parametrize(
    ("changed", "frozen", "guilty"),
    [
        ({}, [2], [2]),
        ({1: status(4)}, [], [1]),
        ({3: status(place="b.py:7 (read)", waits=False)}, [], [3]),
        ({0: status(place="all_gather of b.py:2 (g)")}, [], [0]),
        ({}, [], []),
    ],
)
def test_culprits(changed: dict[int, Status], frozen: list[int], guilty: list[int]) -> None:
    found = {rank: status() for rank in range(4)} | changed
    assert culprits(found, frozen) == guilty
    text = describe(found, [], frozen)
    cause = text.splitlines()[-1]
    assert cause.startswith(ranks_text(guilty) if guilty else "all ranks wait for each other")
    assert not guilty or cause.endswith("the others wait in all_reduce of a.py:1 (f)")


def test_ranks_that_never_started_are_named() -> None:
    text = describe({0: status(), 1: status()}, [2, 3], [])
    assert "ranks 2-3: never started to train" in text
    assert text.splitlines()[-1].startswith("ranks 2-3 gave no sign of life")


def test_ranks_text() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([7, 0, 1, 2]) == "ranks 0-2, 7"


def test_place_outside_collectives() -> None:
    place, waits = place_of(sys._getframe())
    assert Path(__file__).name in place and not waits


def test_bounds_follow_the_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 101.0, 102.5, 102.5, 103.0])
    monkeypatch.setattr("moetron.common.watch.activity.time.monotonic", lambda: next(clock))
    off = settings("dp", watch={"watchdog_seconds": 0})
    watch = settings("dp", watch={"watchdog_save_seconds": 700}).watch
    dog = Watchdog(off, 0, 1)
    dog._watch = watch
    activity.begin(activity.START, 0)
    assert dog.bound_s(activity.current()) == 1800
    activity.begin(activity.STEP, 1)
    assert dog.bound_s(activity.current()) == 1800  # compiles
    activity.begin(activity.STEP, 2)
    activity.begin(activity.STEP, 3)
    assert dog.bound_s(activity.current()) == 60 + 1.5
    with activity.doing("save"):
        assert dog.bound_s(activity.current()) == 700
        with activity.doing("load"):  # part of a save
            assert activity.current().name == "save"
    assert activity.current().name == activity.STEP
