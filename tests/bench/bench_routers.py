"""Losses and loads of every router, trained on the same text, as a Markdown table.

    python tests/bench/bench_routers.py [--only NAME ...] [--steps 200] [--flag value ...]

Flags are those of pretrain_moe.py. --data-path, --valid-data-path and --tokenizer-model give the
text; otherwise samples are synthetic. The model is examples/olmoe_1b_7b/tiny.yaml with batches of 8
samples of 128 tokens. Losses are nats per token: the mean of the last 20 training steps, and of
--eval-iters validation batches, where only BPR is non-causal. Load, dead experts and drops are of
the last 20 steps: largest and smallest expert load over the mean, averaged over layers; experts
with less than 1 % of the mean; choices without a slot. Cost is the median CPU time per step on one
thread, relative to the first row.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from moetron.data.stream.mock_stream import MockStream
from moetron.data.stream.open_streams import open_training, open_validation
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.command import load
from moetron.moe.monitoring.sinks import Loads, Row
from moetron.moe.routing.routing_record import RoutingRecorder
from moetron.moe.training import runtime
from moetron.moe.training.build_trainer import build_trainer
from moetron.moe.training.evaluate import evaluate
from moetron.moe.training.loop import Loop
from moetron.moe.training.sample_stream import Streams
from moetron.tokenizers.load import load_tokenizer

RECIPE = Path(__file__).parents[2] / "examples" / "olmoe_1b_7b" / "tiny.yaml"
LAST = 20
NO_LOSS = "--moe-aux-loss-coeff 0"
SIGMOID = f"--no-moe-router-pre-softmax --moe-router-score-function sigmoid {NO_LOSS}"
BIAS = f"{SIGMOID} --moe-router-enable-expert-bias"
SLOTS = "--moe-expert-capacity-factor 1.25"
CHOICE = f"--moe-router-type expert_choice --moe-expert-capacity-factor 1 {NO_LOSS}"
EVAL = "--moe-expert-choice-eval topk"
KINDS = {
    "top-k": "",
    "top-k, no balance loss": NO_LOSS,
    "top-k, renormalised": "--no-moe-router-pre-softmax",
    "top-k, sigmoid and bias": BIAS,
    "the same in 2 of 4 groups": f"{BIAS} --moe-router-num-groups 4 --moe-router-group-topk 2",
    "top-k, 1.25 slots, first choices first": f"{SLOTS} --moe-token-drop-policy choice",
    "top-k, 1.25 slots, BPR": f"{SLOTS} --moe-token-drop-policy batch_prioritized",
    "Sinkhorn": f"--moe-router-load-balancing-type sinkhorn {NO_LOSS}",
    "expert choice in a sequence": f"{CHOICE} {EVAL} --moe-capacity-scope sequence",
    "expert choice in a micro-batch": f"{CHOICE} {EVAL}",
    "random second": f"--moe-router-type random_second --no-moe-router-pre-softmax {SLOTS}",
    "noisy top-k": "--moe-router-type noisy_topk --moe-router-load-balancing-type noisy_load",
    "straight through": "--moe-router-type straight_through",
    "Gumbel": "--moe-router-type gumbel --moe-router-temperature 2 "
    "--moe-router-final-temperature 0.5 --moe-router-anneal-samples 1200",
    "relaxed top-k": "--moe-router-type relaxed_topk",
    "REINFORCE": "--moe-router-type reinforce --no-moe-router-pre-softmax",
    "hash": f"--moe-router-type hash --no-moe-router-pre-softmax {NO_LOSS} --moe-z-loss-coeff none",
    "top-1": "--moe-router-topk 1",
    "BASE, k = 1": f"--moe-router-type base --moe-router-topk 1 {SIGMOID}",
}


class Rows:
    """Sink that keeps the rows of the loop."""

    def __init__(self) -> None:
        self.steps: list[Row] = []

    def step(self, row: Row) -> None:
        """Keep the row of a step."""
        self.steps.append(row)

    def validation(self, row: Row) -> None:
        """Do nothing; validation is not run."""

    def expert_load(self, step: int, loads: Loads) -> None:
        """Do nothing; the recorder has the loads."""

    def event(self, row: Row) -> None:
        """Ignore events."""

    def rewind(self, step: int) -> None:
        """Do nothing; no run is set back."""

    def close(self) -> None:
        """Do nothing."""


def train(flags: list[str], steps: int) -> tuple[list[float], float]:
    """Train; return the values of one table row and the CPU seconds per step."""
    fixed = ["--config", str(RECIPE), "--train-iters", str(steps)]
    fixed += ["--micro-batch-size", "8", "--global-batch-size", "8", "--cpu-threads", "1"]
    settings = load([*fixed, *flags]).settings
    data, length = settings.data, settings.model.seq_length
    vocab_size = settings.model.vocab_size or 512
    mock = MockStream(1, vocab_size, length)
    streams = Streams(mock, MockStream(2, vocab_size, length))
    if data.tokenizer_model is not None and data.valid_data_path is not None:
        tokenizer = load_tokenizer(data.tokenizer_model)
        vocab_size = tokenizer.vocab_size
        training = open_training(data, length, settings.training.seed, tokenizer)
        held_out = open_validation(data, data.valid_data_path, length, tokenizer)
        streams = Streams(training, held_out)
    assert streams.validation is not None
    with runtime.running(settings) as ranks:
        trainer = build_trainer(settings, ranks, vocab_size)
        rows, seconds = Rows(), []
        loop = Loop(trainer, streams, Progress(), [rows], None)
        batches = loop.batches()
        with RoutingRecorder(trainer.chunks, settings) as recorder:
            for step in range(steps):
                if step == steps - LAST:
                    recorder.reset()
                start = time.process_time()
                loop.step(batches, lambda: False)
                seconds.append(time.process_time() - start)
            routed = recorder.summary()
        held_out_loss = evaluate(trainer, streams.validation).loss
    share_LE = routed.chosen.double() / routed.chosen.double().mean(1, keepdim=True)
    loss = float(np.mean([row["lm_loss"] for row in rows.steps[-LAST:]]))
    busiest, idlest = share_LE.amax(1).mean().item(), share_LE.amin(1).mean().item()
    dead, dropped = (share_LE < 0.01).sum().item(), routed.dropped_fraction
    return [loss, held_out_loss, busiest, idlest, dead, dropped], float(np.median(seconds))


def main() -> None:
    """Train every router and print its row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=200)
    options, flags = parser.parse_known_args()
    names = ["router", "training loss", "validation loss", "busiest", "idlest", "dead", "dropped"]
    print(f"| {' | '.join([*names, 'cost'])} |\n|{'---|' * (len(names) + 1)}", flush=True)
    first: Any = None
    for name in options.only:
        figures, seconds = train([*flags, *KINDS[name].split()], options.steps)
        first = first or seconds
        loss, held_out, busiest, idlest, dead, dropped = figures
        cells = [f"{loss:.3f}", f"{held_out:.3f}", f"{busiest:.2f}", f"{idlest:.2f}"]
        cells += [f"{dead:.0f}", f"{100 * dropped:.1f} %", f"{seconds / first:.2f}"]
        print(f"| {' | '.join([name, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
