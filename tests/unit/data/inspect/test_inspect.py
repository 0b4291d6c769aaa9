import subprocess
import sys
from pathlib import Path

import numpy as np

from moetron.data.inspect.sample_view import GIVEN, LOSS, MARKER, RESET, draw_lengths, sample_text
from moetron.data.inspect.shard_report import blend_table, length_histogram, shard_summary
from moetron.data.shards.shard import Shard
from moetron.data.stream.blend import open_blend
from moetron.tokenizers.byte_level import ByteTokenizer

TOOL = Path(__file__).parents[4] / "tools" / "inspect_data.py"


def run_tool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_histogram_counts_by_powers_of_two() -> None:
    lines = length_histogram(np.array([1, 3, 4, 4, 5, 17], np.int32)).splitlines()
    assert [line.split()[1:4:2] for line in lines] == [
        ["1", "1"],
        ["2", "0"],
        ["4", "3"],
        ["8", "1"],
        ["16", "0"],
        ["32", "1"],
    ]
    assert lines[2].count("█") == 3 * lines[0].count("█") + 1 == 40


def test_summary_names_counts_and_tokenizer(make_shard) -> None:
    prefix = make_shard("a", [[1, 2, 9], [3, 9]])
    summary = shard_summary(Shard(prefix))
    assert "2 documents, 5 tokens (uint16), 2.5 tokens a document" in summary
    assert "toy (ffffffffffff), 1,000 ids, end of document 9 appended" in summary
    Path(prefix + ".json").unlink()
    assert "no manifest" in shard_summary(Shard(prefix))


def test_blend_table_shows_shares_and_epochs(make_shard) -> None:
    prefixes = [make_shard("a", [[1] * 41]), make_shard("b", [[2] * 81])]
    blend = open_blend(["0.75", prefixes[0], "0.25", prefixes[1]], 4)
    cells = [line.split() for line in blend_table(blend, 40).splitlines()]
    assert cells[1] == ["a", "41", "75.00%", "30", "120", "3.000"]
    assert cells[2] == ["b", "81", "25.00%", "10", "40", "0.500"]


def test_the_command_shows_and_verifies(make_shard) -> None:
    documents = [[*text.encode(), ByteTokenizer.eod] for text in ("héllo", "wörld")]
    prefix = make_shard("a", documents, 384, ByteTokenizer.fingerprint)
    arguments = (prefix, "--tokenizer", "bytes", "--verify", "--seq-length", "2")
    done = run_tool(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "document 1, 7 tokens: 'wörld'" in done.stdout and "100.00%" in done.stdout
    tokens = Path(prefix + ".bin")
    tokens.write_bytes(b"\x00" + tokens.read_bytes()[1:])
    done = run_tool(*arguments)
    assert done.returncode == 2 and "a.bin: its SHA-256 is not the manifest's" in done.stderr


RECIPE = """
model: {num_layers: 1, hidden_size: 8, num_attention_heads: 1, seq_length: 4}
training: {train_iters: 3, micro_batch_size: 1, global_batch_size: 2}
learning_rate: {lr: 0.1}
data:
  tokenizer_model: bytes
  stages:
    - {data_path: [3, a, 1, b], until_tokens: 16, objective: prefix_lm}
    - {data_path: [b]}
"""


def test_the_command_shows_the_stages_of_a_recipe(make_shard, tmp_path) -> None:
    for name, letter in (("a", b"a"), ("b", b"b")):
        make_shard(name, [[*letter * 40, ByteTokenizer.eod]], 384, ByteTokenizer.fingerprint)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    done = run_tool("--config", str(recipe), "--data-root", str(tmp_path), "--show", "2")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()[:5]]
    assert rows[1] == ["a", "1", "3", "75.00%", "12", "0.300"]
    assert rows[2][:4] == ["b", "1", "1", "25.00%"]
    assert rows[3] == ["b", "2", "2", "100.00%", "8", "0.200"]
    assert rows[4] == ["b", "all", "3", "50.00%", "12", "0.300"]
    assert "stage 2, sample 4: b, causal, loss on 4 tokens\nb\u00abbbbb\u00bb" in done.stdout
    assert done.stdout.count("stage 1, sample") == done.stdout.count("stage 2, sample") == 2
    assert run_tool("--config", str(tmp_path / "none.yaml")).returncode == 2
    named = run_tool("--config", "olmoe_1b_7b/tiny")
    assert "the recipe needs data" in named.stderr  # it was found


def test_a_reader_that_has_enough_is_no_mistake(make_shard) -> None:
    """As with ``| head``."""
    shard = make_shard("a", [[5]] * 20_000, 384, ByteTokenizer.fingerprint)
    command = [sys.executable, str(TOOL), shard, "--tokenizer", "bytes", "--documents", "20000"]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "stopped: the reader of standard output closed it\n"


def test_colours_and_markers_show_tokens_with_loss() -> None:
    row = np.array([97, 98, 383, 99, 256, 256])
    sample = {"tokens": row[:-1], "labels": row[1:], "loss_mask": np.array([0, 0, 1, 1, 0])}
    text = sample_text(sample, ByteTokenizer(), colour=False)
    assert text == "ab<extra_id_0>\u00abc<eod>\u00bb<eod>"
    coloured = sample_text(sample, ByteTokenizer(), colour=True)
    assert coloured.startswith(f"{GIVEN}ab{RESET}{MARKER}<extra_id_0>{RESET}{LOSS}c{RESET}")


def test_document_lengths_are_drawn(tmp_path) -> None:
    draw_lengths({"a": np.array([1, 3, 900], np.int32)}, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_names_a_users_mistake(make_shard) -> None:
    prefix = make_shard("a", [[1, 9]])
    for message, arguments in {
        "nowhere.idx: no such file": ("nowhere",),
        "not made with the tokenizer bytes": (prefix, "--tokenizer", "bytes"),
        "too few for one sample": (prefix, "--seq-length", "2"),
    }.items():
        done = run_tool(*arguments)
        assert done.returncode == 2 and message in done.stderr
        assert "Traceback" not in done.stderr


def test_numbers_without_meaning_are_refused(make_shard) -> None:
    prefix = make_shard("p", [[1, 2, 3]])
    for flag, value in (("--seq-length", "0"), ("--samples", "-5"), ("--documents", "-1")):
        run = run_tool(prefix, flag, value)
        assert run.returncode == 2
        assert f"argument {flag}: {value}: give a whole number, at least" in run.stderr


def test_flags_that_a_recipe_would_ignore_are_refused(make_shard, tmp_path: Path) -> None:
    """``--verify`` with ``--config`` used to read nothing and to exit with 0."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {mock_data: true}\n")
    for more, name in ((["--verify"], "--verify"), ([make_shard("p", [[1, 2]])], "a prefix")):
        run = run_tool("--config", str(recipe), *more)
        assert run.returncode == 2
        assert f"--config: cannot be combined with {name}" in run.stderr


def test_a_prefix_without_a_name_is_refused() -> None:
    run = run_tool("..")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "is a folder; give the beginning of names in it" in run.stderr
