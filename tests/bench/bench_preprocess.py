"""Preprocessing from end to end against the tokenizer library alone and against other tools.

    python tests/bench/bench_preprocess.py --input 'corpus/*.jsonl' --tokenizer T [--dolma BIN]

One run measures, on the same text with the same tokenizer file and ``--workers``:

library   the tokenizer library's own batch call on texts in memory: one thread's speed times the
          workers, for gigatoken on all threads at once (cold, as a fresh process has it)
ours      tools/preprocess_corpus.py
megatron  Megatron-LM's algorithm: a document a task through a pool of processes, written with
          megatron-core's IndexedDatasetBuilder
dolma     ``dolma tokens`` of the command BIN, for a HuggingFace tokenizer

MB are 1e6 bytes of UTF-8 text. Speeds are net: the time of one document (start-up) is subtracted.
CPU seconds are of all processes; memory is the largest process's peak.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetron.data.chunks import Reject
from moetron.data.inputs import find_files, read_chunks
from moetron.tokenizers.fast_bpe import open_fast
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer

ROOT = Path(__file__).parents[2]
BATCH = 400


@dataclass
class Run:
    """What a command took."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def measured(command: Sequence[str]) -> Run:
    """Run a command to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def texts_of(inputs: Sequence[str]) -> Iterator[str]:
    """Every text."""
    for chunk in read_chunks(find_files(inputs)):
        yield from (found[0] for found in chunk.documents("text") if not isinstance(found, Reject))


def library_run(texts: list[str], source: str, workers: int) -> Run:
    """The library alone on ``workers`` cores: batch calls, texts in memory."""
    reference = load_tokenizer(source)
    fast = open_fast(reference, workers)
    start, start_cpu = time.perf_counter(), time.process_time()
    if fast is not None:
        fast.encode_flat(texts)
    else:
        for first in range(0, len(texts), BATCH):
            reference.encode_flat(texts[first : first + BATCH])
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    return Run(wall_s / (1 if fast else workers), cpu_s, 0.0)


_tokenizer: Tokenizer


def _load(source: str) -> None:
    """Begin a process of Megatron's pool."""
    global _tokenizer
    _tokenizer = load_tokenizer(source)


def _encode(line: str) -> list[int]:
    """One document a task."""
    return [*_tokenizer.encode(json.loads(line)["text"]), _tokenizer.eod]


def megatron(source: str, rows: str, prefix: str, workers: int) -> None:
    """What tools/preprocess_data.py of Megatron-LM does."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = load_tokenizer(source).vocab_size
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocab_size))
    with multiprocessing.Pool(workers, _load, (source,)) as pool, Path(rows).open() as lines:
        for ids in pool.imap(_encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def commands(source: str, rows: Path, out: str, workers: int, dolma: str) -> dict[str, list[str]]:
    """The command of each tool."""
    python = [sys.executable]
    ours = [*python, str(ROOT / "tools" / "preprocess_corpus.py"), "--input", str(rows)]
    ours += ["--tokenizer", source, "--output-prefix", f"{out}/ours", "--append-eod"]
    found = {"ours": [*ours, "--workers", str(workers)]}
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
    """JSONL, and the same packed, as dolma takes it."""
    rows = [json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(rows))
    with gzip.open(f"{path}.gz", "wt", compresslevel=1) as packed:
        packed.writelines(rows)


def report(name: str, one: list[Run], all_: list[Run], megabytes: float, library: Run) -> None:
    """Print medians, what one document takes subtracted."""
    start_s = statistics.median(run.wall_s for run in one)
    start_cpu_s = statistics.median(run.cpu_s for run in one)
    whole_s = statistics.median(run.wall_s for run in all_)
    net_s, net_cpu_s = whole_s - start_s, statistics.median(r.cpu_s for r in all_) - start_cpu_s
    print(
        f"{name}: {megabytes / net_s:.1f} MB/s ({megabytes / whole_s:.1f} with start-up), "
        f"{megabytes / net_cpu_s:.1f} MB a CPU second; start-up {start_s:.2f} s "
        f"({start_cpu_s:.2f} CPU); peak {max(run.peak_mb for run in all_):.0f} MB; of the library "
        f"{library.wall_s / net_s:.2f} (CPU {library.cpu_s / net_cpu_s:.2f})",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tools", nargs="+", default=["ours", "megatron", "dolma"])
    parser.add_argument("--dolma", default="", metavar="BIN")
    args = parser.parse_args()
    texts = list(texts_of(args.input))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    library = library_run(texts, args.tokenizer, args.workers)
    print(
        f"{len(texts)} documents, {megabytes:.1f} MB; "
        f"library {megabytes / library.wall_s:.1f} MB/s, "
        f"{megabytes / library.cpu_s:.1f} MB a CPU second",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        rows, one = Path(folder, "all.jsonl"), Path(folder, "one.jsonl")
        write_rows(rows, texts)
        write_rows(one, texts[:1])
        del texts
        for name in args.tools:
            runs: dict[Path, list[Run]] = {one: [], rows: []}
            for _ in range(args.repeats):
                for source, found in runs.items():
                    with tempfile.TemporaryDirectory(dir=folder) as out:
                        tools = commands(args.tokenizer, source, out, args.workers, args.dolma)
                        if name in tools:
                            found.append(measured(tools[name]))
            if not runs[rows]:
                continue
            report(name, runs[one], runs[rows], megabytes, library)


if __name__ == "__main__":
    if sys.argv[1:2] == ["megatron"]:
        megatron(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()
