"""End-to-end pretraining: shards, training, a signal, a resume, a sample text."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from moetron.common.process import EXIT_STOPPED, EXIT_USER
from moetron.moe.monitoring.sinks import MACHINE_METRICS
from tests.parallel.support.checkpoint_runs import assert_identical, tensors

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "examples" / "olmoe_1b_7b" / "tiny.yaml")
STEPS = 8


def _environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return {**inherited, "OMP_NUM_THREADS": "1"}


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in MACHINE_METRICS} for row in rows
    ]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return flags of a tiny run on two real shards and a validation shard of bytes."""
    folder = tmp_path_factory.mktemp("data")
    for name, pattern in (("code", "moe/*/*.py"), ("prose", "*.md"), ("held", "data/*/*.py")):
        done = _python(
            *(str(ROOT / "tools" / "preprocess_corpus.py"), "--input", str(ROOT / pattern)),
            *("--tokenizer", "bytes", "--append-eod", "--workers", "1"),
            *("--output-prefix", str(folder / name)),
        )
        assert done.returncode == 0, done.stderr
    return [
        *("--config", TINY, "--seq-length", "64", "--train-iters", str(STEPS)),
        *("--no-mock-data", "--vocab-size", "none", "--tokenizer-model", "bytes"),
        *("--lr-warmup-iters", "2", "--eval-interval", "4", "--no-tensorboard"),
        *("--data-path", "0.7", str(folder / "code"), "0.3", str(folder / "prose")),
        *("--valid-data-path", str(folder / "held"), "--cpu-threads", "1"),
        *("--hidden-dropout", "0.1", "--num-workers", "2"),  # generators and loaders matter
    ]


@pytest.fixture(scope="module")
def full_run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("full")
    done = _python(str(ROOT / "pretrain_moe.py"), *flags, "--save", str(folder))
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS}/{STEPS} | loss" in done.stdout
    lines = done.stdout.splitlines()
    assert lines.count("start") == 1
    assert lines.index("start") < next(n for n, line in enumerate(lines) if "| loss" in line)
    data = next(line for line in lines if line.startswith("  data "))
    assert "8 steps, 2 sources; epochs of each: code" in data
    assert "Traceback" not in done.stderr
    return folder


def test_files_of_a_run(full_run: Path) -> None:
    metrics = _lines(full_run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert metrics[-1]["tokens"] == STEPS * 16 * 64
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"]
    assert metrics[0]["aux_loss"] == pytest.approx(1.0, abs=0.2)
    assert 1 <= metrics[0]["expert_load_max_over_mean"] < 16
    assert "dropped_fraction" not in metrics[0]
    evaluations = _lines(full_run / "validation.jsonl")
    assert [row["step"] for row in evaluations] == [4, STEPS]
    assert {row["tokens_evaluated"] for row in evaluations} == {2 * 16 * 64}
    assert (full_run / "latest").read_text() == f"step_{STEPS:07d}\n"


def test_skip_train_evaluates_a_checkpoint(
    flags: list[str], full_run: Path, tmp_path: Path
) -> None:
    evaluate = [str(ROOT / "pretrain_moe.py"), *flags, "--skip-train"]
    step, start = str(full_run / f"step_{STEPS:07d}"), tmp_path / "start"
    done = _python(*evaluate, "--load", step, "--save", str(start), "--finetune")
    assert done.returncode == 0, done.stderr
    (row,) = _lines(start / "validation.jsonl")
    expected = _lines(full_run / "validation.jsonl")[-1]
    assert row == {**expected, "step": 0, "tokens": 0}
    assert not (start / "latest").exists() and not _lines(start / "metrics.jsonl")
    empty = str(tmp_path / "empty")
    done = _python(*evaluate, "--load", empty, "--save", empty)
    assert done.returncode == EXIT_USER and "no checkpoint to evaluate" in done.stderr


def test_a_run_stopped_by_a_signal_resumes_bit_identically(
    flags: list[str], full_run: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "pretrain_moe.py"), *flags]
    command += ["--save", str(tmp_path), "--load", str(tmp_path)]
    with subprocess.Popen(command, env=_environment(), stderr=subprocess.PIPE, text=True) as run:
        metrics = tmp_path / "metrics.jsonl"
        deadline = time.monotonic() + 100
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        errors = run.communicate(timeout=100)[1]
    assert run.returncode == EXIT_STOPPED, errors
    stopped_at = len(_lines(metrics))
    assert 1 <= stopped_at < STEPS
    assert (tmp_path / "latest").read_text() == f"step_{stopped_at:07d}\n"
    done = _python(*command[1:])
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert _lines(tmp_path / name) == _lines(full_run / name)
    last = f"step_{STEPS:07d}"
    one, other = (tensors(folder / last, states=True) for folder in (full_run, tmp_path))
    assert_identical(one, other)
    assert {"rng.python", "rng.numpy", "rng.torch"} < one.keys()


def test_a_sample_text_from_the_run(full_run: Path) -> None:
    tool = (str(ROOT / "tools" / "generate.py"), "--load", str(full_run), "--prompt", "import ")
    first = _python(*tool, "--max-new-tokens", "12", "--seed", "5")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("import ")
    assert _python(*tool, "--top-p", "0").returncode == EXIT_USER


def test_a_taken_port_is_named(flags: list[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        rendezvous = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        done = _python(str(ROOT / "pretrain_moe.py"), *flags, **rendezvous, MASTER_PORT=port)
    assert done.returncode == EXIT_USER, done.stderr
    assert f"MASTER_PORT={port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(flags: list[str]) -> None:
    done = _python(str(ROOT / "pretrain_moe.py"), *flags, "--vocab-size", "100")
    assert done.returncode == EXIT_USER
    assert "--vocab-size 100" in done.stderr


def test_mock_data_do_not_hide_another_vocabulary(tmp_path: Path) -> None:
    """Without shards there is no fingerprint, and no flag gives the vocabulary size."""
    letters = tmp_path / "letters.json"
    pieces = {piece: number for number, piece in enumerate(["<|endoftext|>", *"abcdefgh"])}
    Tokenizer(BPE(vocab=pieces, merges=[])).save(str(letters))
    program, folder = str(ROOT / "pretrain_moe.py"), str(tmp_path / "run")
    sizes = ("--seq-length", "16", "--lr-warmup-iters", "0", "--eval-iters", "0", "--cpu-threads")
    flags = ("--config", TINY, "--vocab-size", "none", *sizes, "1", "--no-tensorboard")
    known = (*flags, "--tokenizer-model", "bytes")
    first = _python(program, *known, "--train-iters", "1", "--save", folder)
    assert first.returncode == 0, first.stderr
    other = (*flags, "--tokenizer-model", str(letters), "--train-iters", "2", "--load", folder)
    for options in ((), ("--finetune",)):
        done = _python(program, *other, *options)
        assert done.returncode == EXIT_USER, done.stderr
        assert "--vocab-size 9, given or the tokenizer's (128 rows" in done.stderr
        assert "checkpoint has 384 (384 rows)" in done.stderr
        assert "--tokenizer-model bytes" in done.stderr
    again = _python(program, *known, "--train-iters", "2", "--load", folder)
    assert again.returncode == 0, again.stderr
    assert "step 2/2" in again.stdout


def test_dry_run_and_user_errors_need_no_torch() -> None:
    check = (
        "import runpy, sys; sys.argv = ['pretrain_moe.py', *sys.argv[1:]]\n"
        "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)"
    )
    script = ("-c", check, str(ROOT / "pretrain_moe.py"), "--config", TINY)
    plan = _python(*script, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "micro-batches" in plan.stdout
    wrong = _python(*script, "--moe-router-topk", "99")
    assert wrong.returncode == EXIT_USER, wrong.stderr
    assert "--moe-router-topk 99" in wrong.stderr
