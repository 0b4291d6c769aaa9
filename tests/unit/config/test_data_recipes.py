"""Published mixtures in examples/: weights, stages, learning rates."""

from pathlib import Path

import numpy as np
import pytest

from moetron.data.addressing.apportionment import Apportionment
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.command import load
from moetron.moe.config.schema.data import StageSettings
from moetron.moe.config.schema.derived import stage_at, total_samples
from moetron.moe.config.schema.settings import Settings
from moetron.moe.training.schedule import LearningRate

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
OLMOE = EXAMPLES / "olmoe_1b_7b" / "pretrain.yaml"
CODE = {"redpajama/github", "the_stack_dedup"}


def settings(folder: str) -> Settings:
    """Return OLMoE's run with the folder's data; the tests do not depend on the model."""
    data = EXAMPLES / folder / "data.yaml"
    argv = ["--config", str(OLMOE), "--config", str(data), "--data-root", "/corpora"]
    return load([*argv, "--dry-run", "--world-size=8", "--device=cuda"]).settings


def blend(stage: StageSettings) -> dict[str, float]:
    words = stage.data_path
    return dict(zip(words[1::2], map(float, words[::2]), strict=True))


@pytest.mark.parametrize(
    ("folder", "code", "ends", "objectives"),
    [
        ("openmoe_base", [52.25], [], ["ul2"]),
        ("openmoe_8b", [52.25, 15], [780_000_000_000], ["ul2", "causal"]),
        ("openmoe_34b", [35, 35], [50_000_000_000], ["ul2", "causal"]),
    ],
)
def test_openmoe_mixtures(folder: str, code: list, ends: list, objectives: list) -> None:
    stages = settings(folder).data.planned_stages()
    assert [stage.until_tokens for stage in stages] == [*ends, None]
    assert [stage.objective for stage in stages] == objectives
    assert all(sum(blend(stage).values()) == 100 for stage in stages)
    found = [sum(w for name, w in blend(stage).items() if name in CODE) for stage in stages]
    assert found == code


def test_openmoe_counts_are_within_two_samples_at_every_batch() -> None:
    for stage in settings("openmoe_8b").data.planned_stages():
        weights = np.array(list(blend(stage).values()))
        apportionment = Apportionment(weights.tolist())
        for batch in range(0, 500):
            n = batch * 1024
            assert np.abs(apportionment.counts(n) - n * weights / 100).max() < 2


def test_olmoe_anneals_in_the_same_run() -> None:
    run = settings("olmoe_1b_7b")
    batch = run.training.global_batch_size
    rate = LearningRate.of(run)
    assert total_samples(run) == 1_223_842 * batch
    assert [stage_at(run, step * batch) for step in (1_199_999, 1_200_000)] == [0, 1]
    steps = {
        2_500: 4e-4,
        1_199_999: 4e-5,
        1_200_000: 4e-5,
        1_211_921: 2e-5,
        1_223_841: 4e-5 / 23_842,
    }
    for step, expected in steps.items():
        samples = step * batch
        assert rate.at(Progress(step, samples, samples * 4096)) == pytest.approx(expected)
    assert run.data.repetition_max_count == 32
    first, last = run.data.planned_stages()
    assert first.data_path == last.data_path and last.seed == 42 and first.seed is None
