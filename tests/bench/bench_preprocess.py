"""Preprocessing against the tokenizer library's own batch speed on the same text.

    python tests/bench/bench_preprocess.py --input 'corpus/*.jsonl' --tokenizer tok.model

Prints MB of text a second of CPU time (all processes, start-up included), which a busy machine
disturbs less than wall time, and the ratio of the tool to the library.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moetron.data.inputs import Reject, find_files, read_chunks
from moetron.data.shard import Shard
from moetron.tokenizers.load import load_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_corpus.py"
BATCH = 400


def library_s(inputs: list[str], source: str) -> float:
    """CPU seconds of the library's batch call, lists of ids as a result, on one thread."""
    tokenizer = load_tokenizer(source)
    chunks = read_chunks(find_files(inputs))
    texts = [text for chunk in chunks for text in chunk.texts("text")]
    usable = [text for text in texts if not isinstance(text, Reject)]
    start = time.process_time()
    for first in range(0, len(usable), BATCH):
        tokenizer.encode_batch(usable[first : first + BATCH])
    return time.process_time() - start


def tool_s(inputs: list[str], source: str, prefix: str, workers: int) -> tuple[float, float]:
    """(CPU, wall) seconds of the whole command."""
    command = [sys.executable, str(TOOL), "--input", *inputs, "--tokenizer", source]
    command += ["--output-prefix", prefix, "--append-eod", "--workers", str(workers)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    arguments = parser.parse_args()
    library = library_s(arguments.input, arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            prefix = f"{folder}/{workers}"
            cpu, wall = tool_s(arguments.input, arguments.tokenizer, prefix, workers)
            manifest = Shard(prefix).manifest
            assert manifest is not None
            megabytes = manifest.text_bytes / 1e6
            print(
                f"{workers} workers: {megabytes / cpu:.1f} MB a CPU second, "
                f"{megabytes / wall:.1f} MB/s, {manifest.tokens / wall / 1e6:.2f} Mtokens/s; "
                f"library {megabytes / library:.1f} MB a CPU second; ratio {library / cpu:.2f}"
            )


if __name__ == "__main__":
    main()
