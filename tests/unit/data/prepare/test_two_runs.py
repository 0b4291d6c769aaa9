"""Concurrent runs, stopped runs, and full disks."""

import json
import logging
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moetron.common.errors import UserError
from moetron.data.prepare import output as output_module
from moetron.data.prepare.options import Options
from moetron.data.prepare.output_lock import lock_outputs
from moetron.data.prepare.preprocess import preprocess

TOOL = Path(__file__).parents[4] / "tools" / "preprocess_corpus.py"


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "in").mkdir()
    rows = [json.dumps({"text": f"{n} " * 50}) for n in range(500)]
    for name in "abcdefgh":
        (tmp_path / "in" / f"{name}.jsonl").write_text("\n".join(rows))
    return Options([str(tmp_path / "in")], "bytes", str(tmp_path / "out" / "p"))


def arguments(options: Options, *more: str) -> list[str]:
    inputs = ["--input", *options.inputs, "--tokenizer", options.tokenizer]
    prefix = ["--output-prefix", options.output_prefix, "--workers", "1"]
    return [sys.executable, str(TOOL), *inputs, *prefix, *more]


def after(change: str, command: list[str]) -> list[str]:
    """Return the command after a change to ``moetron.data.prepare.output``, named ``o``."""
    begin = f"import sys, runpy; from moetron.data.prepare import output as o\n{change}\n"
    run = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return [command[0], "-c", begin + run, *command[1:]]


def test_a_second_run_with_the_same_output_is_refused(options: Options, tmp_path: Path) -> None:
    holdout = {"holdout_fraction": 0.5, "holdout_prefix": str(tmp_path / "out" / "v")}
    for prefix in (options.output_prefix, holdout["holdout_prefix"]):
        with lock_outputs([str(prefix)]):
            with pytest.raises(UserError, match=f"{prefix}: another run is writing it; wait until"):
                preprocess(replace(options, **holdout))
            assert [file.name for file in (tmp_path / "out").iterdir()] == [f"{prefix[-1]}.lock"]
    preprocess(options)
    assert not list((tmp_path / "out").glob("*.lock"))


def test_a_killed_runs_lock_does_not_count(options: Options) -> None:
    path = Path(options.output_prefix + ".lock")
    path.parent.mkdir()
    path.touch()
    assert not preprocess(options).current
    assert not path.exists()


def test_only_one_of_many_holds_an_output(tmp_path: Path) -> None:
    """Owners remove the file: a run that opened it before must not lock a deleted file."""
    inside, most, wins = 0, 0, 0

    def hold() -> None:
        nonlocal inside, most, wins
        for _ in range(200):
            try:
                with lock_outputs([str(tmp_path / "p")]):
                    inside += 1
                    most, wins = max(most, inside), wins + 1
                    time.sleep(0.0005)
                    inside -= 1
            except UserError:
                time.sleep(0.0001)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and wins > 10


def test_one_output_by_two_names_is_refused(options: Options, tmp_path: Path) -> None:
    other = str(tmp_path / "in" / ".." / "out" / "p")
    with pytest.raises(UserError, match=r"--holdout-prefix .* must differ from --output-prefix"):
        preprocess(replace(options, holdout_fraction=0.5, holdout_prefix=other))


def test_shards_beside_an_older_single_one_are_refused(options: Options) -> None:
    """``--data-path P`` would still read the old one."""
    preprocess(options)
    with pytest.raises(UserError, match=r"--shard-size-tokens 9000: .*p\.idx exists from a run"):
        preprocess(replace(options, shard_size_tokens=9000))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_done(options: Options, tmp_path: Path, number: int) -> None:
    expected = tmp_path / "expected"
    preprocess(replace(options, output_prefix=str(expected)))
    slow = "import time; take = o.Output.take\n"
    slow += "def late(self, *given): time.sleep(0.5); take(self, *given)\n"
    slow += "o.Output.take = late"
    command = after(slow, arguments(options))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    started = Path(options.output_prefix + ".bin.tmp")
    while not (started.exists() and started.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "preprocess_corpus: stopped; run the same command to resume" in errors
    assert "Traceback" not in errors
    journal = json.loads(Path(options.output_prefix + ".progress.json").read_bytes())
    assert 0 < journal["rows"] < 4_000
    taken: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        take = output_module.Output.take
        patch.setattr(output_module.Output, "take", lambda o, e: (taken.append(e.rows), take(o, e)))
        preprocess(options)
    assert sum(taken) == 4_000 - journal["rows"]
    for suffix in (".bin", ".idx"):
        made = Path(options.output_prefix + suffix).read_bytes()
        assert made == Path(f"{expected}{suffix}").read_bytes()


@pytest.mark.parametrize("more", [(), ("--deduplicate",)])
def test_a_full_disk_is_named_with_the_output_and_costs_nothing(
    options: Options, more: tuple[str, ...]
) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = arguments(options, *more)
    run = subprocess.run(command, preexec_fn=little_room, capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"--output-prefix {options.output_prefix}: " in run.stderr
    assert "fix this and run the same command to resume" in run.stderr
    assert subprocess.run(command, check=False).returncode == 0
    left = {path.suffix for path in Path(options.output_prefix).parent.iterdir()}
    assert left == {".bin", ".idx", ".json"}


def test_a_disk_that_is_full_for_the_digests_is_named_too(options: Options) -> None:
    """SQLite has its own errors; one-word documents are shorter than their digests."""
    words = "\n".join(json.dumps({"text": str(n)}) for n in range(5000))
    (Path(options.inputs[0]) / "0.jsonl").write_text(words)

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = after("o.JOURNAL_INTERVAL_S = 0.0", arguments(options, "--deduplicate"))
    run = subprocess.run(command, preexec_fn=little_room, capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"--output-prefix {options.output_prefix}: d" in run.stderr  # database or disk is full


def test_a_restart_is_logged(options: Options, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(output_module, "JOURNAL_INTERVAL_S", 0.0)
    finish = output_module.Output.finish_rejects
    monkeypatch.setattr(
        output_module.Output, "finish_rejects", lambda self: Path("/nowhere").stat()
    )
    with pytest.raises(FileNotFoundError):
        preprocess(options)
    monkeypatch.setattr(output_module.Output, "finish_rejects", finish)
    (tmp_path / "in" / "new.jsonl").write_text('{"text": "came in between"}')
    with caplog.at_level(logging.WARNING):
        preprocess(options)
    assert "had other inputs, settings or tokenizer" in caplog.text


def test_dropped_documents_are_printed(options: Options, tmp_path: Path) -> None:
    (tmp_path / "in" / "z.jsonl").write_text("no JSON\n")
    run = subprocess.run(arguments(options, "--deduplicate"), capture_output=True, text=True)
    assert run.returncode == 0
    assert "dropped: rejected 1, duplicate 3500" in run.stdout


def test_a_disk_that_fails_while_it_is_read_loses_nothing(options: Options, tmp_path: Path) -> None:
    reference = replace(options, output_prefix=str(tmp_path / "reference" / "p"))
    preprocess(reference)
    fail = """import io, pathlib
o.JOURNAL_INTERVAL_S = 0.0
opened = pathlib.Path.open
class Failing(io.BytesIO):
    def read(self, size=-1):
        raise OSError(5, 'Input/output error')
def open(path, *given, **named):
    return Failing() if path.name == 'f.jsonl' else opened(path, *given, **named)
pathlib.Path.open = open
"""
    done = subprocess.run(after(fail, arguments(options)), capture_output=True, text=True)
    assert done.returncode == 2
    assert "f.jsonl: cannot be read ([Errno 5] Input/output error); fix this" in done.stderr
    state = json.loads(Path(options.output_prefix + ".progress.json").read_bytes())
    assert state["cursor"]["file"] > 0
    preprocess(options)
    for suffix in (".bin", ".idx"):
        first = Path(reference.output_prefix + suffix).read_bytes()
        assert Path(options.output_prefix + suffix).read_bytes() == first
