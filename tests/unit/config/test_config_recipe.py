"""Strict reading of YAML recipes, and round trips."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moetron.common.errors import ConfigError
from moetron.moe.config import recipe
from moetron.moe.config.schema.paths import path_problem
from moetron.moe.config.schema.settings import Settings

SMALL = {
    "model": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16},
    "training": {"train_iters": 10, "micro_batch_size": 1, "global_batch_size": 4},
    "learning_rate": {"lr": 1e-3},
}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model:\n  lr: 2\n  lr: 3\n", "line 3, column 3: key 'lr' is given twice"),
        ("model: {}\nmodel: {}\n", "line 2, column 1: key 'model' is given twice"),
        ("model:\n  a: [1, 2\nmoe: {}\n", "line 3, column 4: "),
        ("model:\n\tnum_layers: 2\n", "line 2, column 1: found character '\\t'"),
        ("model:\n  1: 2\n", "line 2, column 3: key 1 is not text"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("", "must hold sections"),
        ("- 1\n- 2\n", "must hold sections"),
        ("model: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("model:\n  num_layers: " + "9" * 5000, "limit (4300 digits)"),
        ("model:\n  num_layers: 2001-02-31", "day is out of range"),
        ("model: 3\nmoe: [1]\n", "`model` must hold keys and values, indented"),
    ],
)  # fmt: skip
def test_broken_yaml_is_reported_with_its_position(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipe.read(path)
    assert caught.value.problems[0].startswith(f"--config {path}: ")
    assert problem in caught.value.problems[0]


def test_unreadable_files(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00model")
    for path, problem in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "not a UTF-8 text file"),
    ):
        with pytest.raises(ConfigError, match=problem):
            recipe.read(path)


def test_a_mapping_merges_another_one() -> None:
    tree = recipe.loads("model: &m {lr: 1, min_lr: 2}\nmoe:\n  <<: *m\n  lr: 3\n")
    assert tree["moe"] == {"lr": 3, "min_lr": 2}
    with pytest.raises(recipe.yaml.MarkedYAMLError, match="twice"):
        recipe.loads("model: &m {lr: 1}\nmoe:\n  <<: *m\n  lr: 3\n  lr: 4\n")


def test_an_empty_section_is_an_empty_group(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model:\n  num_layers: 2\nmoe:\n")
    assert recipe.read(path) == {"model": {"num_layers": 2}, "moe": {}}


positive = st.floats(1e-300, 1e300)


def is_path(text: str) -> bool:
    """Return whether a data path leaves a text unchanged."""
    kept = path_problem(text) is None and not text.startswith("~")
    return kept and not text.endswith((".bin", ".idx"))


@hypothesis_settings(deadline=None)  # machines that run several jobs are slow
@given(
    lr=positive,
    epsilon=positive,
    z_loss=st.none() | st.floats(0, 1),
    ramp=st.none() | st.tuples(*[st.integers(1, 2**62)] * 3),
    frequency=st.integers(1, 9) | st.lists(st.sampled_from([0, 1]), min_size=1),
    paths=st.none() | st.lists(st.text().filter(is_path), min_size=1),
    sequence_parallel=st.sampled_from([None, True, False]),
)
def test_round_trip(
    lr: float,
    epsilon: float,
    z_loss: float | None,
    ramp: object,
    frequency: object,
    paths: object,
    sequence_parallel: object,
) -> None:
    settings = Settings.model_validate(
        {
            "model": {**SMALL["model"], "norm_epsilon": epsilon},
            "moe": {"moe_z_loss_coeff": z_loss, "moe_layer_freq": frequency},
            "parallel": {"sequence_parallel": sequence_parallel},
            "training": {**SMALL["training"], "rampup_batch_size": ramp},
            "learning_rate": {"lr": lr},
            "data": {"data_path": paths},
        }
    )
    assert Settings.model_validate(recipe.loads(recipe.dump(settings))) == settings


def test_write_replaces_the_file_atomically(tmp_path: Path) -> None:
    settings, path = Settings.model_validate(SMALL), tmp_path / "settings.yaml"
    path.write_text("old")
    recipe.write(settings, path)
    assert Settings.model_validate(recipe.read(path)) == settings
    assert [entry.name for entry in tmp_path.iterdir()] == ["settings.yaml"]
