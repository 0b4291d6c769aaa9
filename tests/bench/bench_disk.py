"""Speed of a blocking save and of a load, against the sequential speed of the disk.

    python tests/bench/bench_disk.py [--folder DIR] [--repeats 3] [--num-experts 28]

A checkpoint of 2 GB, on one rank. In turns: a file of the same size is written and synced in blocks
of 8 MiB and, out of the page cache, read; the checkpoint is saved and, out of the page cache,
verified and loaded. Prints the medians of the speeds and of the ratios within a turn.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import load_checkpoint, save_checkpoint
from moetron.moe.config.command import load
from moetron.moe.config.schema.settings import Settings
from moetron.moe.training import runtime
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "examples" / "olmoe_1b_7b" / "tiny.yaml"
SHAPE = ["--num-layers=4", "--hidden-size=512", "--moe-ffn-hidden-size=1024"]
BLOCK_BYTES = 8 << 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-experts", type=int, default=28)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        experts = [f"--num-experts={options.num_experts}", "--moe-router-topk=2"]
        given = ["--config", str(RECIPE), "--mock-data", "--save", folder, *SHAPE, *experts]
        settings = load(given).settings
        assert settings.model.vocab_size is not None
        with runtime.running(settings) as ranks:
            trainer = build_trainer(settings, ranks, settings.model.vocab_size)
            state = MockStream(1, settings.model.vocab_size, settings.model.seq_length).state()
            seconds: dict[str, list[float]] = {}
            for number in range(options.repeats):
                size = turn(Run(Path(folder), number + 1, trainer, settings, state), seconds)
    report(seconds, size)


@dataclass(frozen=True)
class Run:
    """A checkpoint to write, with what is in it."""

    folder: Path
    step: int
    trainer: Trainer
    settings: Settings
    state: dict[str, Any]

    @property
    def path(self) -> Path:
        """Folder of the checkpoint."""
        return checkpoint_folder.step_folder(self.folder, self.step)

    def save(self) -> None:
        """Save."""
        model, optimizer = self.trainer.chunks, self.trainer.optimizer
        save_checkpoint(
            self.folder, Progress(self.step), model, optimizer, self.settings, self.state
        )

    def load(self) -> None:
        """Load."""
        model, optimizer = self.trainer.chunks, self.trainer.optimizer
        load_checkpoint(self.path, model, optimizer, self.settings, self.state)


def turn(run: Run, seconds: dict[str, list[float]]) -> int:
    """Measure each once; return the size of the checkpoint in bytes."""
    clock(seconds, "save", run.save)
    size = sum(file.stat().st_size for file in run.path.iterdir())
    other = run.folder / "sequential"
    clock(seconds, "write", partial(write, other, size))
    drop_cache(other)
    clock(seconds, "read", partial(read, other))
    other.unlink()
    for file in run.path.iterdir():
        drop_cache(file)
    clock(seconds, "load", run.load)
    shutil.rmtree(run.path)
    return size


def clock(seconds: dict[str, list[float]], name: str, action: Callable[[], None]) -> None:
    """Append the seconds that an action took."""
    start_s = time.perf_counter()
    action()
    seconds.setdefault(name, []).append(time.perf_counter() - start_s)


def write(path: Path, size_bytes: int) -> None:
    """Write a file in blocks, and sync it."""
    block = os.urandom(BLOCK_BYTES)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size_bytes // BLOCK_BYTES)):
            file.write(block)
        os.fsync(file.fileno())


def read(path: Path) -> None:
    """Read a file in blocks."""
    block = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def drop_cache(path: Path) -> None:
    """Drop a file's pages, which have been synced, from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(seconds: dict[str, list[float]], size_bytes: int) -> None:
    """Print speeds and ratios."""
    print(f"checkpoint of {size_bytes / 1e9:.2f} GB, {len(seconds['save'])} turns")
    for name, times in seconds.items():
        middle = median(times)
        print(f"{name:6} {middle:7.2f} s  {size_bytes / middle / 1e6:6.0f} MB/s (median)")
    for ours, disk in (("save", "write"), ("load", "read")):
        ratios = [b / a for a, b in zip(seconds[ours], seconds[disk], strict=True)]
        print(f"{ours} at {median(ratios):.2f} of the sequential {disk} (median of a turn)")


if __name__ == "__main__":
    main()
