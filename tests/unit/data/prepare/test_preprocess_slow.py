"""Preprocessing at size: random kills, a document of a gigabyte, the fast engine on real text."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetron.data.readers.chunks import Reject
from moetron.data.readers.input_files import find_files
from moetron.data.readers.rows import read_chunks
from moetron.data.shards.shard import Shard
from moetron.tokenizers.fast_bpe import first_difference, open_fast
from moetron.tokenizers.load import load_tokenizer

TOOL = Path(__file__).parents[4] / "tools" / "preprocess_corpus.py"
KILLS = 10
GIGABYTE = 1_000_000_000
REAL = "give MOETRON_BENCH_CORPUS (JSONL, 100 MB or more) and MOETRON_BENCH_BPE (tokenizer.json)"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def command(source: Path, prefix: Path, *flags: str) -> list[str]:
    words = [sys.executable, str(TOOL), "--input", str(source), "--tokenizer", "bytes"]
    return [*words, "--output-prefix", str(prefix), "--append-eod", *flags]


def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    """Kill at random moments within the run's time, with the default journal interval."""
    text = "a line of text that takes some time to hash, to encode and to write\n" * 600
    with (tmp_path / "in.jsonl").open("w") as file:
        for number in range(1000):
            file.write(json.dumps({"text": f"{number // 2} {text}"}) + "\n")
    flags = ["--workers", "2", "--deduplicate", "--shard-size-tokens", "5000000"]
    start = time.monotonic()
    subprocess.run(command(tmp_path / "in.jsonl", tmp_path / "p", *flags), check=True)
    seconds = time.monotonic() - start
    killed, moments = 0, random.Random(0)
    while killed < KILLS:
        words = command(tmp_path / "in.jsonl", tmp_path / "q", *flags)
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
            try:
                process.wait(moments.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        if process.returncode == -signal.SIGKILL:
            killed += 1
        else:  # it finished: start again
            for file in tmp_path.glob("q*"):
                file.unlink()
    subprocess.run(command(tmp_path / "in.jsonl", tmp_path / "q", *flags), check=True)
    shards = sorted(tmp_path.glob("p_*.bin")) + sorted(tmp_path.glob("p_*.idx"))
    assert len(shards) == 10
    for shard in shards:
        assert (tmp_path / shard.name.replace("p", "q", 1)).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_document_of_a_gigabyte(tmp_path: Path, kind: str) -> None:
    line = "one of many millions of lines of a document that is much too long\n"
    file = tmp_path / f"in.{kind}"
    with file.open("w") as stream:
        stream.write('{"text": "' if kind == "jsonl" else "")
        written = line.replace("\n", "\\n") if kind == "jsonl" else line
        for _ in range(GIGABYTE // len(line) // 1000):
            stream.write(written * 1000)
        stream.write('"}' if kind == "jsonl" else "")
    words = command(file, tmp_path / "p", "--workers", "1")
    measure = [sys.executable, "-c", PEAK, *words[1:]]
    done = subprocess.run(measure, check=True, stdout=subprocess.PIPE, text=True)
    peak_gb = float(done.stdout.splitlines()[-1])
    shard = Shard(tmp_path / "p")
    assert shard.document_lengths.tolist() == [GIGABYTE // len(line) // 1000 * 1000 * len(line) + 1]
    assert bytes(shard.tokens[: len(line)].astype("u1")).decode() == line
    print(f"{kind}: peak {peak_gb:.2f} GB")
    assert peak_gb < 0.5


PEAK = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    status = open("/proc/self/status").read()  # ru_maxrss would include the parent's memory
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1e6)
"""


def texts(corpus: str) -> Iterator[list[str]]:
    for chunk in read_chunks(find_files([corpus])):
        yield [found[0] for found in chunk.documents("text") if not isinstance(found, Reject)]


@pytest.mark.skipif("MOETRON_BENCH_CORPUS" not in os.environ, reason=REAL)
def test_the_fast_engine_gives_the_references_ids_on_100_mb() -> None:
    fast = open_fast(load_tokenizer(os.environ["MOETRON_BENCH_BPE"]), threads=2)
    assert fast is not None
    size_bytes = 0
    for batch in texts(os.environ["MOETRON_BENCH_CORPUS"]):
        assert first_difference(fast, batch) is None
        size_bytes += sum(len(text.encode()) for text in batch)
    assert size_bytes >= 100e6
