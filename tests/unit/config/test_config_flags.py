"""Flags of the settings tree; parsing reports all problems."""

import re

import pytest

from moetron.common.errors import ConfigError
from moetron.moe.config.flags import parse, parser
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.settings import Settings, fields


def test_field_names_are_unique_over_groups() -> None:
    names = [name for _, name, _ in fields()]
    assert len(names) == len(set(names))


def test_every_field_has_a_docstring() -> None:
    assert [name for _, name, field in fields() if not field.description] == []


def test_help_shows_every_flag_under_its_group() -> None:
    text = parser().format_help()
    assert [name for _, name, _ in fields() if f"  {flag_name(name)}" not in text] == []
    heads = [text.index(f"\n{group}:\n") for group in Settings.model_fields]
    assert heads == sorted(heads)
    layers = text.index("--num-layers")
    assert text.index("\nmodel:\n") < layers < text.index("\nmoe:\n")
    assert "[default: 1234]" in text and "[required]" in text


def test_help_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    assert "--num-experts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "group", "expected"),
    [
        (["--num-layers", "4"], "model", {"num_layers": "4"}),
        (["--num-layers=4"], "model", {"num_layers": "4"}),
        (["--num-layers", "4", "--num-layers", "8"], "model", {"num_layers": "8"}),
        (["--bf16"], "precision", {"bf16": True}),
        (["--bf16", "--fp32"], "precision", {"bf16": False}),
        (["--disable-bias-linear"], "model", {"add_bias_linear": False}),
        (["--no-swiglu"], "model", {"swiglu": False}),
        (["--data-path", ".3", "a", ".7", "b"], "data", {"data_path": [".3", "a", ".7", "b"]}),
        (["--rampup-batch-size", "8", "4"], "training", {"rampup_batch_size": ["8", "4"]}),
        (["--moe-layer-freq", "2"], "moe", {"moe_layer_freq": "2"}),
        (["--moe-layer-freq", "0", "1"], "moe", {"moe_layer_freq": ["0", "1"]}),
        (["--moe-z-loss-coeff", "none"], "moe", {"moe_z_loss_coeff": None}),
        (["--data-path", "none"], "data", {"data_path": None}),
        (["--position-embedding-type", "none"], "model", {"position_embedding_type": "none"}),
    ],
)  # fmt: skip
def test_values(argv: list[str], group: str, expected: object) -> None:
    given = parse(argv)
    assert given.problems == []
    assert given.settings == {group: expected}


def test_the_commands_own_options_are_not_settings() -> None:
    given = parse(["--config", "r.yaml", "--dry-run", "--world-size", "8", "--rank", "3"])
    assert given.settings == {}
    assert given.options == {"config": ["r.yaml"], "dry_run": True, "world_size": "8", "rank": "3"}


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--num-expert", "8"], "unknown flag --num-expert; did you mean --num-experts?"),
        (["--num_layers=4"], "unknown flag --num_layers; did you mean --num-layers?"),
        (["--train-iter", "8"], "unknown flag --train-iter; did you mean --train-iters?"),
        (["--xyzzy"], "unknown flag --xyzzy"),
        (["-v"], "unknown flag -v"),
        (["--lr"], "--lr needs a value"),
        (["--config"], "--config needs a value"),
        (["--config", "a", "--config"], "--config needs a value"),
        (["--data-path", "--mock-data"], "--data-path needs a value"),
        (["recipe.yaml"], "unexpected argument 'recipe.yaml': it follows no flag"),
        (["--lr", "1", "2"], "unexpected argument '2': it follows no flag"),
    ],
)  # fmt: skip
def test_problems(argv: list[str], problem: str) -> None:
    assert parse(argv).problems == [problem]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bf16", "true"], {"bf16": True}),
        (["--bf16=False"], {"bf16": False}),
        (["--fp32", "true"], {"bf16": False}),
        (["--no-swiglu=1"], {"swiglu": False}),
        (["--no-load-optim", "on"], {"no_load_optim": True}),
        (["--load-optim"], {"no_load_optim": False}),
        (["--sequence-parallel", "none"], {"sequence_parallel": None}),
        (["--bf16=perhaps"], {"bf16": "perhaps"}),  # pydantic refuses it
    ],
)
def test_a_switch_takes_a_truth_value(argv: list[str], expected: dict[str, object]) -> None:
    given = parse(argv)
    assert given.problems == []
    assert list(given.settings.values()) == [expected]


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--fp32", "false"], "--fp32 false: it turns off and takes no value; --bf16 turns on"),
        (["--no-swiglu=x"], "--no-swiglu x: it turns off and takes no value; --swiglu turns on"),
        (["--dry-run=perhaps"], "--dry-run perhaps: must be true or false"),
        (["--bf16", "r.yaml"], "unexpected argument 'r.yaml': it follows no flag"),
        (["--bf16", "lr=1"], "unexpected argument 'lr=1': it follows no flag; write --lr 1"),
        (["--training.seed", "1"], "unknown flag --training.seed: use --seed, without the group"),
        (["--no-no-load-optim"], "unknown flag --no-no-load-optim"),
    ],
)
def test_other_values_of_switches(argv: list[str], problem: str) -> None:
    assert parse(argv).problems == [problem]


def test_switches_of_the_command_take_a_truth_value() -> None:
    assert parse(["--dry-run", "true", "--build=false"]).options == {
        "dry_run": True,
        "build": False,
    }


@pytest.mark.parametrize("columns", ["60", "200"])
def test_help_is_complete_at_any_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines fit the terminal; words are not split at hyphens, nor defaults from their labels."""
    monkeypatch.setenv("COLUMNS", columns)
    text = parser().format_help()
    assert "megatron-core" in text and not re.search(r"\w-\n", text)
    assert not re.search(r"\[default:\s*\n", text) and "\xa0" not in text
    words = [line for line in text.splitlines() if not line.lstrip().startswith("-")]
    assert max(map(len, words)) <= 100


def test_all_problems_together() -> None:
    problems = parse(["--foo", "1", "--lr", "--bar=2", "--seed", "1"]).problems
    assert problems == ["unknown flag --foo", "unknown flag --bar", "--lr needs a value"]


def test_the_message_counts_and_lists() -> None:
    assert str(ConfigError(["a", "b"])) == "2 problems in the settings:\n  - a\n  - b"
    assert str(ConfigError(["a"])).startswith("1 problem in")
