"""Paths of settings and tools: addresses and shell variables are refused before a run."""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest

from moetron.common.errors import ConfigError
from moetron.moe.config.command import load
from moetron.moe.config.schema.field import flag_name, type_text
from moetron.moe.config.schema.paths import ToolParser
from moetron.moe.config.schema.settings import fields

ROOT = Path(__file__).resolve().parents[3]
PATHS = {
    *("save", "load", "tensorboard_dir", "data_path", "valid_data_path", "data_root"),
    *("tokenizer_model", "memory_snapshot_path", "tp_comm_overlap_cfg"),
    "preference_reference_load",
}
RECIPE = """\
model: {num_layers: 2, hidden_size: 8, num_attention_heads: 2, seq_length: 16, vocab_size: 100}
training: {train_iters: 10, micro_batch_size: 1, global_batch_size: 4}
learning_rate: {lr: 1e-3}
"""


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    return caught.value.problems


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_settings_of_paths_are_marked() -> None:
    marked = {name for _, name, field in fields() if "path" in type_text(field).split(")")[0]}
    assert marked - {"stages"} == PATHS
    named = ("_path", "_dir", "_root", "_folder", "_file")
    assert {name for _, name, _ in fields() if name.endswith(named)} <= PATHS


@pytest.mark.parametrize("name", sorted(PATHS))
@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://b/x", "https://host/x", "R2://b"])
def test_an_address_is_refused(recipe: Path, name: str, address: str) -> None:
    words = ["0.5", "ok", "0.5", address] if "data_path" in name else [address]
    found = problems("--config", str(recipe), "--dry-run", flag_name(name), *words)
    scheme = address.partition(":")[0]
    assert len(found) == 1, found
    assert found[0].startswith(f"{flag_name(name)} {' '.join(words)}: an address, not a path")
    assert f"({scheme}://) is not supported; give a path on a mounted file system" in found[0]


def test_an_address_in_a_recipe_and_in_a_stage_is_refused(recipe: Path) -> None:
    stage = "[{data_path: [hdfs://node/shard]}]"
    recipe.write_text(f"{RECIPE}checkpoint: {{load: az://b/run}}\ndata: {{stages: {stage}}}\n")
    stages, loads = problems("--config", str(recipe), "--dry-run")
    assert "--stages" in stages and "hdfs://" in stages and "an address" in stages
    assert loads.startswith("--load az://b/run: an address")


def test_a_recipe_address_is_refused() -> None:
    first, second = problems("--foo", "--config", "gs://bucket/recipe.yaml")
    assert first == "unknown flag --foo"
    assert second.startswith("--config gs://bucket/recipe.yaml: an address, not a path")


def test_a_file_address_is_refused_with_its_path(recipe: Path) -> None:
    (line,) = problems("--config", str(recipe), "--dry-run", "--load", "file:///data/run")
    assert line == "--load file:///data/run: an address, not a path: give the path alone, /data/run"


def test_an_unset_shell_variable_is_refused(recipe: Path) -> None:
    (line,) = problems("--config", str(recipe), "--dry-run", "--save", "")
    assert line == "--save : empty: give a path (unset shell variable?)"


def test_shell_expansions(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["--config", str(recipe), "--dry-run"]
    assert load([*argv, "--save=~/run"]).settings.checkpoint.save == "/home/me/run"
    assert load([*argv, "--save", "~no_such_user/run"]).settings.checkpoint.save is not None
    assert load([*argv, "--save", "a$b/c"]).settings.checkpoint.save == "a$b/c"
    (line,) = problems(*argv, "--data-path", "1", "${SCRATCH}/shard")
    assert "the variable ${SCRATCH} is not expanded here: write its value" in line


def parse(*argv: str) -> argparse.Namespace:
    parser = ToolParser(prog="tool")
    parser.add_argument("--load", type=Path)
    parser.add_argument("--input", nargs="+", default=[])
    parser.add_argument("--prompt", type=str)
    parser.add_foreign({"--checkpoint": "use --load"})
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("export").add_argument("--output", type=Path)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--load", "s3://b/run"], "argument --load: s3://b/run: an address, not a path"),
        (["--input", "a", "code=gs://b/c"], "argument --input: code=gs://b/c: an address"),
        (["export", "--output", "hdfs://n/x"], "argument --output: hdfs://n/x: an address"),
        (["--load", "$WORK/run"], "argument --load: $WORK/run: the variable $WORK"),
        (["--load", ""], "argument --load: : empty: give a path"),
        (["--lod=run"], "unknown flag --lod; did you mean --load?"),
        (["export", "stray"], "unexpected argument 'stray': it follows no flag"),
        (["--checkpoint", "x"], "unknown flag --checkpoint: use --load"),
    ],
)
def test_a_tools_arguments_are_paths(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tools_text_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = parse("--prompt", "see https://a.org", "--load=~/run", "--input", "0.5", "a")
    assert given.prompt == "see https://a.org"
    assert given.load == Path("/home/me/run")
    assert given.input == ["0.5", "a"]


def test_preprocessing_gives_hints_for_megatrons_flags() -> None:
    program = [sys.executable, str(ROOT / "tools" / "preprocess_corpus.py"), "--json-keys", "text"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unknown flag --json-keys: use --text-key" in done.stderr


COMMANDS = sorted((ROOT / "moetron" / "commands").glob("[a-z]*.py"))


@pytest.mark.parametrize("tool", COMMANDS, ids=lambda path: path.stem)
def test_every_tool_checks_its_paths(tool: Path) -> None:
    tree = ast.parse(tool.read_text(encoding="utf-8"))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "ToolParser" in calls
    assert not [call for call in calls if call.endswith("ArgumentParser")]


@pytest.mark.parametrize("tool", COMMANDS, ids=lambda path: path.stem)
def test_help_of_a_tool_shows_lines_as_they_are_written(tool: Path) -> None:
    """A backslash at the end of a docstring line would join two lines in help."""
    source = tool.read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(source), clean=False)
    assert doc is not None
    assert doc.count("\n") == source.partition('"""')[2].partition('"""')[0].count("\n")
