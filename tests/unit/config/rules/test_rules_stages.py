"""Data stages from recipes and flags, and their rules."""

from pathlib import Path
from typing import Any

import pytest

from moetron.moe.config import flags, recipe
from moetron.moe.config.checks import input_problems
from moetron.moe.config.schema.data import StageLearningRate, StageSettings
from moetron.moe.config.validate import validate
from tests.unit.config.config_cases import found, make

FIRST = {"data_path": ["1", "a", "2", "b"], "until_tokens": 64, "objective": "ul2"}
LAST = {"data_path": ["b"], "seed": 7}


def with_stages(*stages: Any, **changes: Any) -> list[str]:
    return found(mock_data=False, stages=list(stages), **changes)


def test_stages_are_read_as_mappings_and_as_flags() -> None:
    settings = make(mock_data=False, stages=[FIRST, LAST])
    assert settings.data.stages == [StageSettings(**FIRST), StageSettings(**LAST)]
    words = ["{data_path: [1, a, 2, b], until_tokens: 64, objective: ul2}", "{data_path: [b]}"]
    given = flags.parse(["--stages", *words]).settings
    _, _, faulty = validate(given)
    assert "lr" in faulty and "stages" not in faulty
    assert "until_tokens: 64" in recipe.dump(settings)
    assert with_stages(FIRST, LAST) == []


def test_weights_in_a_recipe_are_numbers() -> None:
    assert make(valid_data_path=[0.25, "a", 1, "b"]).data.valid_data_path == ["0.25", "a", "1", "b"]


def test_caps_of_single_sources_are_names_and_numbers() -> None:
    assert make(source_max_epochs=["code", 4, "web", 1.5]).data.epoch_caps() == {
        "code": 4.0,
        "web": 1.5,
    }
    assert make().data.epoch_caps() == {}
    for wrong, rule in (
        (["code"], "'code' has no pair"),
        (["4", "code"], "'code', the epochs of '4', is not a number above 0"),
        (["code", "0"], "'0', the epochs of 'code', is not a number above 0"),
        (["code", "nan"], "'nan', the epochs of 'code', is not a number above 0"),
        (["a", "1", "b"], "'b' has no pair"),
        (["a", "1", "a", "2"], "'a' is given twice"),
    ):
        _, problems, faulty = validate({"data": {"source_max_epochs": wrong}})
        assert "source_max_epochs" in faulty
        form = "give NAME EPOCHS NAME EPOCHS ..., such as code 4 web 1.5"
        assert f"--source-max-epochs {' '.join(wrong)}: {rule}; {form}" in problems


@pytest.mark.parametrize(
    ("stage", "rule"),
    [
        ({"until_tokens": 5}, "entry 1 lacks `data_path`"),
        ({"data_path": ["a"], "typo": 1}, "entry 1 has the unknown key `typo`"),
        ("a: [", "mapping of data_path"),
    ],
)
def test_a_malformed_stage_is_refused(stage: Any, rule: str) -> None:
    _, problems, faulty = validate({"data": {"stages": [stage]}})
    assert "stages" in faulty
    assert any("--stages" in line and rule in line for line in problems)


def test_every_malformed_entry_is_named_without_the_others() -> None:
    stages = [{"data_path": ["a"], "until_token": 5}, {"data_path": ["b"], "objective": "ul3"}]
    _, problems, _ = validate({"data": {"stages": stages}})
    first, second = [line for line in problems if "stages" in line]
    assert (
        first == "--stages: entry 1 has the unknown key `until_token`; did you mean until_tokens?"
    )
    assert second.startswith("--stages: entry 2, `objective` ul3: Input should be 'causal'")


@pytest.mark.parametrize(
    ("stages", "changes", "expected"),
    [
        ([], {}, "--stages is empty: give at least one stage"),
        ([LAST], {"data_path": ["a"]}, "--stages and --data-path exclude each other: drop one"),
        ([LAST], {"objective": "ul2"}, "--objective ul2: with --stages, each stage names its own"),
        ([LAST, LAST], {}, "stage 1: until_tokens None: another follows it"),
        ([FIRST], {}, "stage 1: until_tokens 64: the last ends with the run"),
        ([FIRST, {**FIRST, "until_tokens": 80}, LAST], {}, "stage 2: until_tokens 80 leaves it no"),
        ([{"data_path": ["0", "a"]}], {}, "--stages, stage 1: weight '0' must be a number above 0"),
        ([{"data_path": []}], {}, "--stages, stage 1 is empty"),
        ([{**LAST, "learning_rate": {"lr": 1, "min_lr": 2}}], {}, "stage 1: min_lr 2.0 exceeds lr"),
    ],
)
def test_each_rule_is_reported_alone(stages: Any, changes: Any, expected: str) -> None:
    (line,) = with_stages(*stages, **changes)
    assert expected in line


def test_shards_of_stages_must_be_there(tmp_path) -> None:
    shard = str(tmp_path / "a")
    stages = [{"data_path": ["1", shard], "until_tokens": 64}, {"data_path": [shard]}]
    settings = make(mock_data=False, tokenizer_model="bytes", stages=stages)
    (line,) = input_problems(settings)
    assert line.startswith(f"--stages {shard}: there is no file")


def test_the_documented_example_is_valid() -> None:
    page = (Path(__file__).parents[4] / "docs" / "data_format.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    assert found(**{"mock_data": False, **recipe.loads(example)["data"]}) == []


def test_mock_data_replace_all_shards() -> None:
    stage = {**LAST, "learning_rate": {"lr": "4.0e-5"}}
    settings = make(stages=[stage], valid_data_path=["nowhere"])
    assert settings.data.stages is not None
    assert settings.data.stages[0].learning_rate == StageLearningRate(lr=4e-5)
    assert input_problems(settings) == []


def test_relative_prefixes_start_from_the_root(tmp_path) -> None:
    data = make(data_root="/corpora").data
    assert data.rooted(["0.5", "a", "2", "/b"]) == ["0.5", "/corpora/a", "2", "/b"]
    settings = make(mock_data=False, data_root=str(tmp_path), data_path=["a"])
    assert any(line.startswith(f"--data-path {tmp_path}/a:") for line in input_problems(settings))


def test_a_bidirectional_prefix_needs_a_prefix_and_a_mask() -> None:
    def problems(**changes: Any) -> list[str]:
        shards = {"mock_data": False, "data_path": ["a"], "bidirectional_prefix": True}
        return found(**{**shards, **changes})

    assert problems(objective="prefix_lm") == []
    (line,) = problems()
    assert "needs --objective prefix_lm or ul2" in line
    (line,) = problems(objective="ul2", attention_backend="unfused")
    assert "use --attention-backend sdpa" in line
    (line,) = problems(objective="ul2", context_parallel_size=2, world_size=2)
    assert "use --context-parallel-size 1" in line


def test_fim_sources_need_a_name_and_a_fim_stage() -> None:
    (line,) = with_stages(FIRST, LAST, fim_sources=["a", "b"])
    assert line == "--fim-sources a b needs --objective fim (in a stage, at least)"
    assert with_stages({**FIRST, "objective": "fim"}, LAST, fim_sources=["a"]) == []
    assert found(fim_sources=["a"]) == []  # mock data replace all stages
    (line,) = with_stages({**LAST, "objective": "fim"}, fim_sources=[])
    assert line.startswith("--fim-sources is empty: name sources")
    assert flags.parse(["--fim-sources", "a", "b"]).settings["data"]["fim_sources"] == ["a", "b"]
