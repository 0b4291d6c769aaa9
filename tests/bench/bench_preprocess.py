"""End-to-end preprocessing against the bare tokenizer library and other tools.

    python tests/bench/bench_preprocess.py --input 'corpus/*.jsonl' --tokenizer T [--dolma BIN]

One run measures, in turns, with the same tokenizer file and ``--workers``, and prints a table:

library   batch call of the tokenizer library on texts in memory: one thread's speed times the
          workers, or gigatoken's own threads; in a new process, so with cold caches.
          BPE uses gigatoken if it supports the tokenizer; ``--no-fast``: HuggingFace
one core  the same on one thread
ours      tools/preprocess_corpus.py
megatron  Megatron-LM's algorithm: one document per task in a process pool, written with
          megatron-core's IndexedDatasetBuilder
dolma     ``BIN tokens``, for a HuggingFace tokenizer

MB are 1e6 bytes of UTF-8 text. Speeds exclude start-up (the time of one document). Slower tools
get ``--others-mb`` of the text. CPU seconds are of all processes; memory is the peak of the
largest process, for the library with all texts in memory. Medians.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import gigatoken

from moetron.common.text import table
from moetron.data.readers.chunks import Reject
from moetron.data.readers.input_files import find_files
from moetron.data.readers.rows import read_chunks
from moetron.tokenizers.fast_bpe import open_fast
from moetron.tokenizers.huggingface import HuggingFaceTokenizer
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer

ROOT = Path(__file__).parents[2]
BATCH = 400
ALONE = ("library", "one core")
"""Tools that measure themselves, with all texts in memory."""


@dataclass
class Run:
    """Time and memory of a command."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def measured(command: Sequence[str]) -> tuple[Run, str]:
    """Run a command; return its time and memory and its last output line."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read().strip().rpartition("\n")[2]
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3), output


def texts_of(inputs: Sequence[str]) -> Iterator[str]:
    """Yield every text."""
    for chunk in read_chunks(find_files(inputs)):
        yield from (found[0] for found in chunk.documents("text") if not isinstance(found, Reject))


def library(source: str, rows: str, workers: int, try_fast: bool) -> None:
    """Print time of the library on the texts, and the number of tokens."""
    texts = list(texts_of([rows]))
    reference = load_tokenizer(source)
    fast = open_fast(reference) if try_fast else None
    os.environ["RAYON_NUM_THREADS"] = str(workers if fast else 1)
    if fast is None:
        batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    else:
        assert isinstance(reference, HuggingFaceTokenizer)
        engine = gigatoken.Tokenizer.from_json(reference.definition)
    start, start_cpu = time.perf_counter(), time.process_time()
    if fast is None:
        tokens = sum(reference.encode_flat(batch)[0].size for batch in batches)
    else:
        tokens = engine.encode_batch(texts, parallel=workers > 1).layout.content.length
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    print(json.dumps([wall_s / (1 if fast else workers), cpu_s, tokens]))


_tokenizer: Tokenizer


def _load(source: str) -> None:
    """Initialize a process of Megatron's pool."""
    global _tokenizer
    _tokenizer = load_tokenizer(source)


def _encode(line: str) -> list[int]:
    """Encode one document."""
    return [*_tokenizer.encode(json.loads(line)["text"]), _tokenizer.eod]


def megatron(source: str, rows: str, prefix: str, workers: int) -> None:
    """Preprocess as tools/preprocess_data.py of Megatron-LM."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = load_tokenizer(source).vocab_size
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocab_size))
    with multiprocessing.Pool(workers, _load, (source,)) as pool, Path(rows).open() as lines:
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def commands(
    source: str, rows: Path, out: str, workers: int, dolma: str, fast: bool
) -> dict[str, list[str]]:
    """Return the command of each tool."""
    python = [sys.executable]
    ours = [*python, str(ROOT / "tools" / "preprocess_corpus.py"), "--input", str(rows)]
    ours += ["--tokenizer", source, "--output-prefix", f"{out}/ours", "--append-eod"]
    alone = [*python, __file__, "library", source, str(rows)]
    engine = str(int(fast))
    found = {"library": [*alone, str(workers), engine], "one core": [*alone, "1", engine]}
    found["ours"] = [*ours, "--workers", str(workers), *([] if fast else ["--no-fast"])]
    found["megatron"] = [*python, __file__, "megatron", source, str(rows), f"{out}/m", str(workers)]
    if dolma and source.endswith(".json"):
        tokenizer = load_tokenizer(source)
        words = [dolma, "tokens", "--documents", f"{rows}.gz", "--destination", f"{out}/dolma"]
        words += ["--tokenizer.name_or_path", source, "--dtype", "uint16"]
        words += ["--tokenizer.eos_token_id", str(tokenizer.eod)]
        words += ["--tokenizer.pad_token_id", str(tokenizer.pad), "--processes", str(workers)]
        found["dolma"] = words
    return found


def write_rows(path: Path, texts: Sequence[str]) -> None:
    """Write JSONL and its gzip copy for dolma."""
    rows = [json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(rows))
    with gzip.open(f"{path}.gz", "wt", compresslevel=1) as packed:
        packed.writelines(rows)


def prepare(rows: dict[str, Path], inputs: Sequence[str], others_mb: float) -> dict[str, float]:
    """Write one, few and all texts, shuffled; return their MB."""
    texts = list(texts_of(inputs))
    random.Random(0).shuffle(texts)
    ends = list(accumulate(len(text.encode()) for text in texts))
    counts = {"one": 1, "few": max(1, bisect_right(ends, others_mb * 1e6)), "all": len(texts)}
    for name, count in counts.items():
        write_rows(rows[name], texts[:count])
    return {name: ends[count - 1] / 1e6 for name, count in counts.items()}


class Bench:
    """Measurements of each tool on one document and on many, by repeat."""

    def __init__(self, folder: Path, inputs: Sequence[str], others_mb: float) -> None:
        self.rows = {name: folder / f"{name}.jsonl" for name in ("one", "few", "all")}
        # In a separate process: its memory would count in the peak of its children.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            self.megabytes = pool.apply(prepare, (self.rows, inputs, others_mb))
        self.runs: dict[tuple[str, str], list[Run]] = {}
        self.tokens = 0

    def size(self, tool: str) -> str:
        """Return the name of the text for a tool."""
        return "all" if tool in (*ALONE, "ours") else "few"

    def measure(self, tool: str, source: str, workers: int, dolma: str, fast: bool) -> None:
        """Run a tool on one document and on many."""
        for size in ("one", self.size(tool)):
            with tempfile.TemporaryDirectory(dir=self.rows[size].parent) as out:
                words = commands(source, self.rows[size], out, workers, dolma, fast).get(tool)
                if words is None:
                    return
                run, said = measured(words)
            if tool in ALONE:
                run.wall_s, run.cpu_s, self.tokens = json.loads(said)
            self.runs.setdefault((tool, size), []).append(run)

    def row(self, tool: str) -> list[str]:
        """Return the table row of a tool."""
        size = self.size(tool)
        megabytes = self.megabytes[size]
        one, whole = self.median(tool, "one"), self.median(tool, size)
        if tool in ALONE:  # measures itself, without start-up
            one = Run(0.0, 0.0, 0.0)
        base = self.median("library", "all")
        net_s, net_cpu_s = whole.wall_s - one.wall_s, whole.cpu_s - one.cpu_s
        speed, cpu_speed = megabytes / net_s, megabytes / net_cpu_s
        return [
            tool,
            f"{megabytes:.1f}",
            f"{speed:.1f}",
            f"{speed * self.tokens / self.megabytes['all'] / 1e6:.2f}",
            f"{megabytes / whole.wall_s:.1f}",
            f"{cpu_speed:.1f}",
            f"{one.wall_s:.2f}",
            f"{whole.peak_mb:.0f}",
            f"{speed * base.wall_s / self.megabytes['all']:.2f}",
            f"{cpu_speed * base.cpu_s / self.megabytes['all']:.2f}",
        ]

    def median(self, tool: str, size: str) -> Run:
        """Return the median over repeats."""
        runs = self.runs[tool, size]
        columns = ("wall_s", "cpu_s", "peak_mb")
        return Run(*(statistics.median(getattr(run, name) for run in runs) for name in columns))


COLUMNS = ("tool", "MB", "MB/s", "Mtokens/s", "MB/s all in", "MB/CPU s", "start-up s", "peak MB")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tools", nargs="+", default=["ours", "megatron", "dolma"])
    parser.add_argument("--dolma", default="", metavar="BIN")
    parser.add_argument("--others-mb", type=float, default=10)
    parser.add_argument("--no-fast", action="store_true", help="use HuggingFace's library for BPE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.input, args.others_mb)
        tools = [*ALONE, *args.tools]
        for _ in range(args.repeats):
            for tool in tools:
                bench.measure(tool, args.tokenizer, args.workers, args.dolma, not args.no_fast)
        rows = [bench.row(tool) for tool in tools if (tool, "one") in bench.runs]
    print(table([[*COLUMNS, "of library", "of library, CPU"], *rows]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["megatron"]:
        megatron(*sys.argv[2:5], int(sys.argv[5]))
    elif sys.argv[1:2] == ["library"]:
        library(*sys.argv[2:4], int(sys.argv[4]), sys.argv[5] == "1")
    else:
        main()
