"""Speed of training while a checkpoint is written, on the quick start's model.

    torchrun --nproc-per-node 2 tests/bench/bench_async_save.py DIR [--pairs 40]

Steps in pairs: one without a save, one that begins right after --async-save has copied the tensors,
so the files are written during it and the steps that follow. The next pair waits for the files.
Prints the median of the ratios of the pairs, of the steps until the files are complete, and of the
pause in which the copy is made.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch.distributed as dist

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.checkpoint.background_save import Saver
from moetron.moe.config.command import load
from moetron.moe.training import runtime
from moetron.moe.training.build_trainer import build_loop, build_trainer
from moetron.moe.training.loop import Loop
from moetron.moe.training.sample_stream import Streams

RECIPE = Path(__file__).parents[2] / "examples" / "quickstart" / "pretrain.yaml"
VOCAB_SIZE = 2048
WARMUP_STEPS = 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="empty or new output folder, the same on all ranks")
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    fixed = ["--config", str(RECIPE), "--mock-data", "--no-tensorboard", "--async-save"]
    size = ["--vocab-size", str(VOCAB_SIZE)]
    settings = load([*fixed, *size, "--save", options.folder, "--keep-last", "1"]).settings
    with runtime.running(settings) as ranks:
        mock = MockStream(1, VOCAB_SIZE, settings.model.seq_length)
        loop = build_loop(build_trainer(settings, ranks, VOCAB_SIZE), Streams(mock, None))
        found = measure(loop, Saver(settings, ranks.writer), options.pairs)
        if ranks.rank == 0:
            report(found)


def measure(loop: Loop, saver: Saver, pairs: int) -> list[tuple[float, list[float], float]]:
    """Return, for each pair, seconds of: a step without a save, the steps during one, the pause."""
    batches = loop.batches()

    def timed(action: Callable[[], object]) -> float:
        dist.barrier()  # over all ranks: none starts its clock before the others are ready
        start_s = time.perf_counter()
        action()
        return time.perf_counter() - start_s

    def step() -> float:
        return timed(lambda: loop.step(batches, lambda: False))

    def save() -> None:
        trainer = loop.trainer
        state = loop.streams.training.state()
        saver.save(loop.progress, trainer.chunks, trainer.optimizer, state)

    for _ in range(WARMUP_STEPS):
        step()
    found = []
    for _ in range(pairs):
        alone_s = step()
        pause_s = timed(save)
        during_s = [step()]
        while not all_written(saver):
            during_s.append(step())
        saver.wait()
        found.append((alone_s, during_s, pause_s))
    return found


def all_written(saver: Saver) -> bool:
    """Return whether all ranks' files are complete."""
    written: list[object] = [None] * dist.get_world_size()
    # All-gather over all ranks: each must run the same number of steps.
    dist.all_gather_object(written, saver._writing is None or saver._writing.done())
    return all(written)


def report(found: list[tuple[float, list[float], float]]) -> None:
    """Print the medians."""
    alone_s = median(alone for alone, _, _ in found)
    every = [step / alone for alone, during, _ in found for step in during]
    print(f"{len(found)} saves, a step without one {alone_s:.4f} s (median)")
    print(f"first step during a save      {median(d[0] / a for a, d, _ in found):.3f} of its pair")
    print(f"steps until files are complete {median(every):.3f} of their pair ({len(every)} steps)")
    print(f"pause for the copy            {median(pause for _, _, pause in found):.4f} s")


if __name__ == "__main__":
    main()
