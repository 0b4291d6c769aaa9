"""Preprocessing that is killed and resumes."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moetron.data.encoding.filters import Filters
from moetron.data.prepare import engine as engine_module
from moetron.data.prepare import output as output_module
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
from moetron.data.readers import rows as inputs_module

TEXTS = [f"document {i}: {'äöü 漢字 ' * (i % 7)}" for i in range(24)]
OUTPUTS = ["p.bin", "p.idx", "p.json", "p.rejects.jsonl", "v.bin", "v.idx", "v.json"]


@pytest.fixture
def options(tmp_path: Path, monkeypatch) -> Options:
    """Options for several chunks of rows and files, some packed, with bad rows and a holdout."""
    monkeypatch.setattr(inputs_module, "CHUNK_BYTES", 800)
    monkeypatch.setattr(output_module, "JOURNAL_INTERVAL_S", 0.0)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # a kill does not clear the page cache
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join([*rows[:16], b"bad\n", b"{}\n"]))
    (tmp_path / "in" / "b.txt").write_text("plain " * 140)
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(gzip.compress(b"".join(rows[14:])))
    (tmp_path / "in" / "d.txt").write_text("plain")
    return Options(
        [str(tmp_path / "in")],
        "bytes",
        str(tmp_path / "out" / "p"),
        append_eod=True,
        holdout_fraction=0.2,
        holdout_prefix=str(tmp_path / "out" / "v"),
        max_bad_fraction=0.2,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed_at(operation: int, options: Options) -> bool:
    """Return whether a process was killed at its n-th file operation."""

    def counted(function: Callable) -> Callable:
        def call(*arguments, **named):
            nonlocal operation
            operation -= 1
            if operation < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    def run() -> None:
        os.fsync, Path.replace, Path.unlink = map(counted, (os.fsync, Path.replace, Path.unlink))
        output_module.Output.take = counted(output_module.Output.take)
        preprocess(options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(30)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("split", [False, True])
def test_a_run_killed_at_any_step_resumes_to_the_same_bytes(options: Options, split) -> None:
    out = Path(options.output_prefix).parent
    if split:
        filters = Filters(deduplicate=True)
        options = replace(options, shard_size_tokens=300, filters=filters)
    preprocess(options)
    expected = contents(out)
    assert {"p_00002.bin", "v_00000.json"} < set(expected) if split else sorted(expected) == OUTPUTS
    operation = 0
    while True:
        for name in expected:
            (out / name).unlink()
        if not killed_at(operation, options):
            break
        if operation % 5 == 0:
            killed_at(operation // 3, options)  # kill the resumed run too
        preprocess(options)
        assert contents(out) == expected, f"killed at step {operation}"
        operation += 4 if split else 1
    assert operation > 40


def test_resumes_instead_of_starting_again(options: Options, monkeypatch) -> None:
    taken = []
    real = engine_module.encode_chunk

    def counting(encoding, chunk, tokenizer):
        taken.append(chunk)
        return real(encoding, chunk, tokenizer)

    monkeypatch.setattr(engine_module, "encode_chunk", counting)
    preprocess(replace(options, output_prefix=options.output_prefix + "2"))
    tasks = len(taken)
    for path in Path(options.output_prefix).parent.iterdir():
        path.unlink()
    assert killed_at(20, options)
    taken.clear()
    preprocess(options)
    assert 0 < len(taken) < tasks


def test_other_inputs_start_again(options: Options) -> None:
    assert killed_at(20, options)
    Path(options.inputs[0], "d.txt").write_text("other")
    preprocess(options)
    changed = contents(Path(options.output_prefix).parent)
    for name in changed:
        Path(options.output_prefix).with_name(name).unlink()
    preprocess(options)
    assert contents(Path(options.output_prefix).parent) == changed


SCRIPT = """
import sys
from moetron.data.prepare import output
from moetron.data.readers import rows
from moetron.data.encoding.filters import Filters
from moetron.data.prepare.options import Options
from moetron.data.prepare.preprocess import preprocess
rows.CHUNK_BYTES, output.JOURNAL_INTERVAL_S = 20_000, 0.0
if __name__ == "__main__":
    preprocess(Options([sys.argv[1]], "bytes", sys.argv[2], workers=2))
"""


def test_the_workers_of_a_killed_run_end_and_it_resumes(tmp_path: Path) -> None:
    text = "a line of text that is long enough to take some time\n" * 200
    rows = [json.dumps({"text": f"{i} {text}"}) for i in range(100)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    (tmp_path / "run.py").write_text(SCRIPT)
    source = str(tmp_path / "in.jsonl")
    command = [sys.executable, str(tmp_path / "run.py"), source, str(tmp_path / "p")]
    for _ in range(2):
        journal = read(tmp_path / "p.progress.json")
        with subprocess.Popen(command, start_new_session=True) as process:
            while process.poll() is None and read(tmp_path / "p.progress.json") == journal:
                time.sleep(0.01)
            process.kill()
        assert process.returncode == -signal.SIGKILL and group_ends(process.pid)
    subprocess.run(command, check=True, timeout=120)
    preprocess(Options([source], "bytes", str(tmp_path / "q")))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"p{suffix}").read_bytes() == (tmp_path / f"q{suffix}").read_bytes()


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def group_ends(group: int) -> bool:
    """Return whether every process of a group ends within some seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
