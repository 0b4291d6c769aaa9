"""Cost of a checkpoint: time that training is blocked, and speed of verification.

    python tests/bench/bench_checkpoint.py [--repeats 5] [--folder DIR]

A model of 27 million parameters with Adam's moments in fp32. Prints the size of a checkpoint and
the median seconds of a blocking save, of the blocking part of --async-save (a copy), of its write
in the background without training, and of SHA-256 and a plain read from the page cache.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.background_save import Saver
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.command import load
from moetron.moe.training import runtime
from moetron.moe.training.build_trainer import build_loop, build_trainer
from moetron.moe.training.loop import Loop
from moetron.moe.training.sample_stream import Streams

RECIPE = Path(__file__).parents[2] / "examples" / "olmoe_1b_7b" / "tiny.yaml"
MODEL = ["--num-layers=4", "--hidden-size=256", "--moe-ffn-hidden-size=512", "--num-experts=16"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="output folder (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        fixed = ["--config", str(RECIPE), "--mock-data", "--no-tensorboard", "--save", folder]
        settings = load([*fixed, *MODEL, "--exit-interval", "1"]).settings
        background = load([*fixed, *MODEL, "--async-save"]).settings
        assert settings.model.vocab_size is not None
        with runtime.running(background) as ranks:
            mock = MockStream(1, settings.model.vocab_size, settings.model.seq_length)
            loop = build_loop(
                build_trainer(settings, ranks, settings.model.vocab_size), Streams(mock, None)
            )
            loop.run(lambda: False)
            measure(
                loop,
                Path(folder),
                Saver(settings),
                Saver(background, ranks.writer),
                options.repeats,
            )


def measure(loop: Loop, run: Path, blocking: Saver, background: Saver, repeats: int) -> None:
    """Measure all in turns, so that machine noise affects them equally."""
    last = checkpoint_folder.step_folder(run, 1)
    size = checkpoint_folder.verify(last) / 1e6
    seconds: dict[str, list[float]] = {}

    def clock(name: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    def save(saver: Saver, step: int) -> None:
        trainer = loop.trainer
        saver.save(Progress(step), trainer.chunks, trainer.optimizer, loop.streams.training.state())

    for number in range(repeats):
        clock("blocking save", partial(save, blocking, 2 + 2 * number))
        clock("stall of --async-save", partial(save, background, 3 + 2 * number))
        clock("its writing", background.wait)
        clock("verify", lambda: checkpoint_folder.verify(last))
        clock("plain read", lambda: [path.read_bytes() for path in last.iterdir()])
        for step in (2 + 2 * number, 3 + 2 * number):
            shutil.rmtree(checkpoint_folder.step_folder(run, step))
    print(f"checkpoint of {size:.0f} MB")
    for name, times in seconds.items():
        middle = median(times)
        print(f"{name:22} {middle:7.3f} s  {size / middle:6.0f} MB/s")


if __name__ == "__main__":
    main()
