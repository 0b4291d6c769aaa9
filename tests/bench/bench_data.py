"""Speed of the data path on this machine; prints measurements, asserts nothing.

    python tests/bench/bench_data.py [--sources 8] [--tokens 100_000_000]

Loader: causal and UL2 samples in random order from several sources, one core, page cache warm: our
stream one by one and in batches, and megatron-core's blended GPT datasets on the same shards.
Start-up: time and memory to the first batch after imports, in new processes, on sparse files of
1e7, 1e8 and 1e9 tokens, and ours on 1e12; documents have 1,000 tokens up to 1e9.
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
from typing import Any

import numpy as np

from moetron.data.objectives.ul2 import UL2
from moetron.data.shards.indexed_format import HEADER, LENGTH, MAGIC, POINTER, VERSION
from moetron.data.shards.shard_writer import ShardWriter
from moetron.data.stream.token_stream import TokenStream, training_stream

VOCAB_SIZE = 50_280
DOCUMENT_TOKENS = 1000
SPARSE_DOCUMENT_TOKENS = 1 << 30
SEQ_LENGTHS = (256, 4096)
SECONDS = 3.0
BATCH = 16


def make_shards(folder: Path, sources: int, tokens: int) -> list[str]:
    """Write shards of random tokens, ``tokens`` in total."""
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


def make_sparse_shard(prefix: Path, tokens: int, document_tokens: int) -> str:
    """Write a sparse shard of zeros; ``tokens`` is rounded down to documents."""
    documents = tokens // document_tokens
    pointers = np.arange(documents, dtype=POINTER) * document_tokens * 2
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        file.write(np.full(documents, document_tokens, LENGTH).tobytes())
        file.write(pointers.tobytes())
        file.write(np.arange(documents + 1, dtype=POINTER).tobytes())
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(documents * document_tokens * 2)
    return str(prefix)


def rate(read: Callable[[int], object], numbers: Iterable[int], tokens_a_call: int) -> float:
    """Return millions of tokens per CPU second, over about ``SECONDS``."""
    start, calls = time.process_time(), 0
    for number in numbers:
        read(number)
        calls += 1
        if (seconds := time.process_time() - start) > SECONDS:
            break
    return calls * tokens_a_call / seconds / 1e6


def bench_ours(prefixes: list[str], seq_length: int) -> None:
    """Measure samples in run order, in random order and in batches."""
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
    """Measure the same shards as UL2 samples, in run order."""
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
    """Read every page of the shards into memory."""
    for source in stream.sources:
        source.shards[0].tokens[::1024].sum()


def megatron_dataset(prefixes: list[str], seq_length: int) -> Any:
    """Return the same shards as a BlendedMegatronDatasetBuilder dataset."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

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
    return builder.build()[0]


def bench_megatron(prefixes: list[str], seq_length: int) -> None:
    """Measure megatron-core's samples in run order."""
    dataset = megatron_dataset(prefixes, seq_length)
    speed = rate(dataset.__getitem__, range(len(dataset)), seq_length)
    print(f"S={seq_length}: megatron-core's blend {speed:.1f} Mtokens/s")


def first_batch(loader: str, prefixes: list[str]) -> None:
    """Print seconds and MiB of the first batch in this process."""
    import megatron.core.datasets.gpt_dataset  # noqa: F401 - imports do not count

    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before_mib, start = peak_mib(), time.perf_counter()
    if loader == "ours":
        training_stream(prefixes, 4096, seed=1).batch(range(BATCH))
    else:
        dataset = megatron_dataset(prefixes, 4096)
        np.stack([dataset[number]["tokens"] for number in range(BATCH)])
    print(json.dumps([time.perf_counter() - start, peak_mib() - before_mib]))


def bench_start(folder: Path, sources: int) -> None:
    """Measure time and memory to the first batch by tokens, ours and megatron-core's."""
    print(f"first batch of {BATCH} x 4,096, {sources} sources: seconds, MiB more")
    for tokens in (10**7, 10**8, 10**9, 10**12):
        huge = tokens > 10**9
        length = SPARSE_DOCUMENT_TOKENS if huge else DOCUMENT_TOKENS
        prefixes = [
            make_sparse_shard(folder / f"sparse{tokens}-{source}", tokens // sources, length)
            for source in range(sources)
        ]
        for loader in ("ours",) if huge else ("ours", "megatron"):
            command = [sys.executable, __file__, "first", loader, *prefixes]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            seconds, mebibytes = json.loads(done.stdout.splitlines()[-1])
            print(f"{tokens:.0e} tokens, {loader}: {seconds:.3f} s, {mebibytes:.1f}", flush=True)


def main() -> None:
    """Print all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench_start(Path(folder), arguments.sources)
        prefixes = make_shards(Path(folder), arguments.sources, arguments.tokens)
        for seq_length in SEQ_LENGTHS:
            bench_ours(prefixes, seq_length)
            bench_ul2(prefixes, seq_length)
            bench_megatron(prefixes, seq_length)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["first"]:
        first_batch(sys.argv[2], sys.argv[3:])
    else:
        main()
