"""Four kills of the chaos lane; `bash tests/run.sh --chaos` makes sixty."""

import random
from pathlib import Path

import pytest

from tests.chaos.kills import MOMENTS, VICTIMS, Layout, differences, harass, plans, table


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_four_times_equals_one_that_is_not(tmp_path: Path) -> None:
    layout = Layout(ranks=2, background=True, workers=1, steps=16)
    plan = [("group", "start"), ("rank", "save"), ("launcher", "step"), ("all", "save")]
    counts = harass(layout, plan, tmp_path, random.Random(7))
    assert sum(counts.kills.values()) == 4, table({layout: counts})
    assert not counts.different and not counts.left
    assert counts.runs >= 1


def test_plans_have_every_kind_as_often() -> None:
    made = list(plans(60, 4, random.Random(3)))
    assert [len(plan) for plan in made] == [20, 20, 10, 10]
    every = [kind for plan in made for kind in plan]
    assert all(every.count((v, m)) == 5 for v in VICTIMS for m in MOMENTS)


def test_a_difference_is_seen(tmp_path: Path) -> None:
    for name, loss in (("one", 1.0), ("other", 1.5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(f'{{"step": 1, "lm_loss": {loss}}}\n')
        (folder / "validation.jsonl").write_text("")
        (folder / "step_0000001").mkdir()
        (folder / "latest").write_text("step_0000001\n" if name == "one" else "step_0000002\n")
    assert differences(tmp_path / "one", tmp_path / "other") == ["metrics", "last step"]
