"""Cost of our training step over a minimal loop on the same megatron-core modules.

    python tests/bench/bench_step.py [--steps 20] [--flag value ...]
    torchrun --nproc-per-node 2 tests/bench/bench_step.py --expert-model-parallel-size 2

The model is that of the quick start. Three kinds of steps alternate in one process, on one model
and optimizer, so that machine noise affects all equally: ours (loading samples, routing counts,
metrics, reports), bare (random tokens, no metrics, no checks), and bare with torch's default
instead of fused AdamW. Prints medians and median ratios of paired steps, in wall time and in CPU
time, which other programs disturb less.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from moetron.data.stream.mock_stream import MockStream
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.command import load
from moetron.moe.config.schema.derived import num_microbatches
from moetron.moe.monitoring.peak_flops import Peak
from moetron.moe.monitoring.sinks import open_sinks
from moetron.moe.routing.routing_record import RoutingRecorder
from moetron.moe.training import runtime
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.loop import Loop
from moetron.moe.training.sample_stream import Streams
from moetron.moe.training.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "examples" / "quickstart" / "pretrain.yaml"
WARM_UP = 3

Times = dict[str, list[np.ndarray]]
"""Kind of step -> [wall, CPU] seconds of each step."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        # Flags of the command line come last and override these.
        fixed = ["--config", str(RECIPE), "--mock-data", "--save", folder]
        fixed += ["--vocab-size", "8192", "--expert-model-parallel-size", "1"]
        settings = load([*fixed, *flags]).settings
        with runtime.running(settings) as ranks:
            trainer = build_trainer(settings, ranks, 8192)
            measure(trainer, options.steps)


def measure(trainer: Trainer, steps: int) -> None:
    """Run ``steps`` steps of each kind, alternating."""
    settings = trainer.settings
    assert trainer.recorder is not None
    trainer.recorder.close()  # bare steps run without its hooks
    stream = MockStream(1, trainer.vocab_size, settings.model.seq_length)
    sinks = open_sinks(settings, 0) if trainer.runtime.is_main else []
    loop = Loop(trainer, Streams(stream, None), Progress(), sinks, Peak(1.0, "none"))
    batches = loop.batches()
    kinds: dict[str, Callable[[], object]] = {
        "ours": lambda: loop.step(batches, lambda: False),
        "bare": partial(bare_step, trainer),
        "bare, default AdamW": partial(bare_step, trainer, fused=False),
    }
    times: Times = {name: [] for name in kinds}
    for turn in range(WARM_UP + steps):
        for name, step in kinds.items():
            if name == "ours":
                recorder = RoutingRecorder(trainer.chunks, settings)
                loop.trainer = dataclasses.replace(trainer, recorder=recorder)
            torch.distributed.barrier()
            start = clocks()
            step()
            if turn >= WARM_UP:
                times[name].append(clocks() - start)
            if name == "ours":
                recorder.close()
    if trainer.runtime.is_main:
        report(times)


def bare_step(trainer: Trainer, fused: bool = True) -> None:
    """Run a step with the minimum that megatron-core requires."""
    for group in trainer.optimizer.param_groups:
        group["fused"] = fused
    settings = trainer.settings
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=partial(bare_forward, trainer),
        data_iterator=None,
        model=list(trainer.chunks),
        num_microbatches=num_microbatches(settings, trainer.runtime.world_size),
        seq_length=settings.model.seq_length,
        micro_batch_size=settings.training.micro_batch_size,
        forward_only=False,
    )
    trainer.optimizer.step()
    for group in trainer.optimizer.param_groups:
        group["fused"] = True


def bare_forward(trainer: Trainer, _: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Run the model on random tokens, which are also the labels."""
    shape = (trainer.settings.training.micro_batch_size, trainer.settings.model.seq_length)
    tokens = torch.randint(trainer.vocab_size, shape)
    positions = torch.arange(shape[1]).expand(shape)
    return chunk(tokens, positions, None, labels=tokens), bare_loss


def bare_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Return the sum and number of token losses."""
    return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), None


def clocks() -> np.ndarray:
    """Return [wall, CPU] seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def report(times: Times) -> None:
    """Print medians and paired ratios."""
    row = "{:<28}{:>10.{places}f}{:>10.{places}f}".format
    print(f"{'':<28}{'wall':>10}{'CPU':>10}")
    for name, values in times.items():
        print(row(f"{name}, ms", *np.median(values, axis=0) * 1e3, places=0))
    for other in list(times)[1:]:
        ratios = np.array(times["ours"]) / np.array(times[other])
        print(row(f"ours / {other}", *np.median(ratios, axis=0), places=3))


if __name__ == "__main__":
    main()
