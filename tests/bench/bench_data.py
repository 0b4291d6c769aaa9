"""Speed of the data path on this machine; prints figures, asserts nothing.

    python tests/bench/bench_data.py [--sources 8] [--tokens 100_000_000]

Loader: causal and UL2 samples in random order from several sources, one core, page cache warm: our
stream one by one and in batches, beside megatron-core's blended GPT datasets on the same shards.
Start-up: time and memory to the first sample of 1e9 and of 1e12 tokens (sparse files), in fresh
processes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from moetron.data.indexed_format import HEADER, LENGTH, MAGIC, POINTER, VERSION
from moetron.data.objectives.ul2 import UL2
from moetron.data.stream import TokenStream, training_stream
from moetron.data.writer import ShardWriter

VOCAB_SIZE = 50_280
DOCUMENT_TOKENS = 1000
SPARSE_DOCUMENT_TOKENS = 1 << 30
SEQ_LENGTHS = (256, 4096)
SECONDS = 3.0
BATCH = 16


def make_shards(folder: Path, sources: int, tokens: int) -> list[str]:
    """Shards of random tokens, ``tokens`` in all."""
    generator = np.random.default_rng(0)
    prefixes = []
    for source in range(sources):
        documents = tokens // sources // DOCUMENT_TOKENS
        prefix = str(folder / f"source{source}")
        with ShardWriter(prefix, VOCAB_SIZE) as writer:
            ids = generator.integers(0, VOCAB_SIZE, documents * DOCUMENT_TOKENS, dtype=np.uint16)
            writer.add(ids, np.full(documents, DOCUMENT_TOKENS))
            writer.finish()
        prefixes.append(prefix)
    return prefixes


def make_sparse_shard(prefix: Path, tokens: int) -> str:
    """A shard of zeros that takes no room on the disk; ``tokens`` is a multiple of 2^30."""
    documents = tokens // SPARSE_DOCUMENT_TOKENS
    pointers = np.arange(documents, dtype=POINTER) * SPARSE_DOCUMENT_TOKENS * 2
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        file.write(np.full(documents, SPARSE_DOCUMENT_TOKENS, LENGTH).tobytes())
        file.write(pointers.tobytes())
        file.write(np.arange(documents + 1, dtype=POINTER).tobytes())
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(tokens * 2)
    return str(prefix)


def rate(read: Callable[[int], object], numbers: Iterable[int], tokens_a_call: int) -> float:
    """Millions of tokens a second over about ``SECONDS``."""
    start, calls = time.perf_counter(), 0
    for number in numbers:
        read(number)
        calls += 1
        if (seconds := time.perf_counter() - start) > SECONDS:
            break
    return calls * tokens_a_call / seconds / 1e6


def bench_ours(prefixes: list[str], seq_length: int) -> None:
    """Samples in the run's order, then at random numbers, then in batches."""
    stream = training_stream(prefixes, seq_length, seed=1)
    touch(stream)
    far = np.random.default_rng(1).integers(0, 1 << 40, 1 << 20).tolist()
    every = range(1 << 40)
    batches = rate(
        lambda i: stream.batch(range(i * BATCH, (i + 1) * BATCH)), every, seq_length * BATCH
    )
    print(
        f"S={seq_length}: stream[n] in order {rate(stream.__getitem__, every, seq_length):.1f}, "
        f"batches of {BATCH} {batches:.1f}, "
        f"at scattered n {rate(stream.__getitem__, far, seq_length):.2f} Mtokens/s"
    )


def bench_ul2(prefixes: list[str], seq_length: int) -> None:
    """The same shards as UL2 samples, in the run's order."""
    objective = UL2(
        seq_length,
        encode=lambda text: list(text.encode()),
        sentinels=range(VOCAB_SIZE - 300, VOCAB_SIZE),
        end=1,
        start=0,
        examples=max(1, seq_length // 2048),
    )
    stream = training_stream(prefixes, seq_length, seed=1, objective=objective)
    touch(stream)
    speed = rate(stream.__getitem__, range(1 << 40), seq_length)
    print(f"S={seq_length}: UL2 {speed:.1f} Mtokens/s")


def touch(stream: TokenStream) -> None:
    """Bring every page of the shards into memory."""
    for source in stream.sources:
        source.shards[0].tokens[::1024].sum()


def bench_megatron(prefixes: list[str], seq_length: int) -> None:
    """The same shards through BlendedMegatronDatasetBuilder and GPTDataset."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    start = time.perf_counter()
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_length,
        blend=(prefixes, None),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=SimpleNamespace(vocab_size=VOCAB_SIZE, eod=0, pad=-1, unique_identifiers={}),
        mid_level_dataset_surplus=0.005,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config)
    dataset = builder.build()[0]
    dataset[0]
    first_s = time.perf_counter() - start
    speed = rate(dataset.__getitem__, range(len(dataset)), seq_length)
    print(
        f"S={seq_length}: megatron-core's blend {speed:.1f} Mtokens/s, first sample {first_s:.2f} s"
    )


FIRST_SAMPLE = r"""
import json, re, sys, time
from pathlib import Path
import numpy, orjson, pydantic
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before, start = peak(), time.perf_counter()
from moetron.data.stream import training_stream
training_stream([sys.argv[1]], 4096, seed=1)[12345]
seconds = time.perf_counter() - start
print(json.dumps([seconds, peak() - before]))
"""


def bench_start(folder: Path) -> None:
    """Time and memory to the first sample, libraries already imported."""
    for tokens in (1 << 30, 1 << 40):
        prefix = make_sparse_shard(folder / f"sparse{tokens}", tokens)
        command = [sys.executable, "-c", FIRST_SAMPLE, prefix]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        seconds, kibibytes = json.loads(done.stdout)
        print(f"{tokens:.1e} tokens: first sample {seconds:.3f} s, {kibibytes / 1024:.1f} MiB more")


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench_start(Path(folder))
        prefixes = make_shards(Path(folder), arguments.sources, arguments.tokens)
        for seq_length in SEQ_LENGTHS:
            bench_ours(prefixes, seq_length)
            bench_ul2(prefixes, seq_length)
            bench_megatron(prefixes, seq_length)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
