"""Run folders work from any directory, and without the original tokenizer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moetron.common.process import EXIT_USER
from moetron.moe.config.recipe import read
from tests.unit.tokenizers import kinds

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml"
TEXT = "one two three four five six seven eight nine ten eleven twelve"
SIZES = ("--seq-length", "16", "--lr-warmup-iters", "0", "--eval-iters", "0", "--no-tensorboard")


class Started(NamedTuple):
    run: Path
    """Run folder after two steps."""
    elsewhere: Path
    """Working directory of the commands."""
    shard: str
    flags: tuple[str, ...]
    """Flags of the start, in the parent of the run folder."""


def python(cwd: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=250,
    )


def done(cwd: Path, script: str, *arguments: object) -> str:
    found = python(cwd, script, *arguments)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """Train with a relative path to a tokenizer, then delete the tokenizer."""
    work = tmp_path_factory.mktemp("work")
    (work / "tok").mkdir()
    (work / "elsewhere").mkdir()
    kinds.write("template", work / "tok", [TEXT * 20])
    (work / "x.jsonl").write_text(f"{json.dumps({'text': TEXT})}\n" * 20)
    shard = str(work / "x")
    options = ("--input", "x.jsonl", "--tokenizer", "tok", "--append-eod", "--workers", "1")
    done(work, "tools/preprocess_corpus.py", *options, "--output-prefix", shard)
    flags = ("--config", str(TINY), "--no-mock-data", "--vocab-size", "none", *SIZES)
    flags += ("--tokenizer-model", "tok", "--data-path", shard, "--save", "run")
    done(work, "pretrain_moe.py", *flags, "--train-iters", "2")
    shutil.rmtree(work / "tok")
    return Started(work / "run", work / "elsewhere", shard, flags)


def test_its_settings_are_a_recipe_that_names_the_copy(started: Started) -> None:
    tree = read(started.run / "step_0000002" / "settings.yaml")
    assert tree["data"]["tokenizer_model"] == str(started.run / "tokenizer")
    record = json.loads((started.run / "step_0000002" / "run.json").read_text())
    assert record["settings"]["data"]["tokenizer_model"] == str(started.run / "tokenizer")


def test_generate_and_analyses(started: Started) -> None:
    run, shard = started.run, started.shard
    generate = ("--load", run, "--prompt", "one two", "--max-new-tokens", "3")
    assert done(started.elsewhere, "tools/generate.py", *generate).startswith("one two")
    analyze = (run, "--data", f"x={shard}", "--tokens-per-class", "32", "--seq-length", "16")
    out = started.elsewhere / "analysis"
    done(started.elsewhere, "tools/analyze_routing.py", *analyze, "--output", out)
    assert (out / "analysis.json").is_file()


def test_exports_encode_as_the_shards(started: Started) -> None:
    transformers = pytest.importorskip("transformers")
    out = started.elsewhere / "hf"
    convert = "tools/convert_checkpoint.py"
    done(started.elsewhere, convert, "to-hf", "--load", started.run, "--output", out)
    shard = IndexedDataset(started.shard)  # keep a reference: rows are views
    theirs = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert theirs(TEXT).input_ids == shard[0].tolist()[:-1]

    back = started.elsewhere / "back"
    done(started.elsewhere, convert, "from-hf", "--load", out, "--output", back)
    shutil.rmtree(out)
    flags = ("--config", back / "model.yaml", "--load", back, "--finetune", *SIZES)
    flags += ("--data-path", started.shard, "--micro-batch-size", 1, "--global-batch-size", 2)
    more = ("--lr", "1e-4", "--train-iters", "1", "--save", started.elsewhere / "next")
    done(started.elsewhere, "pretrain_moe.py", *flags, *more)
    assert (started.elsewhere / "next" / "tokenizer" / "tokenizer.json").is_file()


def test_resume_and_finetune(started: Started) -> None:
    work = started.run.parent
    text = done(work, "pretrain_moe.py", *started.flags, "--load", "run", "--train-iters", "3")
    assert "step 3/3" in text and "--tokenizer-model" not in text
    recipe = started.run / "step_0000002" / "settings.yaml"
    tuned = ("--config", recipe, "--load", started.run, "--finetune", "--save", "tuned")
    assert "step 2/2" in done(started.elsewhere, "pretrain_moe.py", *tuned, "--train-iters", "2")
    names = {path.name for path in (started.elsewhere / "tuned" / "tokenizer").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "fingerprint"}


def test_a_changed_copy_is_refused(started: Started, tmp_path: Path) -> None:
    shutil.copytree(started.run, tmp_path / "run")
    file = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"use_regex": true', '"use_regex": false'))
    convert = ("to-hf", "--load", tmp_path / "run", "--output", tmp_path / "hf")
    resume = (*started.flags, "--load", tmp_path / "run", "--train-iters", "4")
    for script, arguments in (
        ("tools/generate.py", ("--load", tmp_path / "run")),
        ("tools/convert_checkpoint.py", convert),
        ("pretrain_moe.py", resume),
    ):
        found = python(tmp_path, script, *arguments)
        assert found.returncode == EXIT_USER, found.stderr
        assert "tokenizer: was changed" in found.stderr
        assert "Traceback" not in found.stderr
