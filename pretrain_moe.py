"""Pretrain a Mixture-of-Experts language model.

    torchrun --nproc-per-node 2 pretrain_moe.py --config RECIPE.yaml [--flag value ...]
    python pretrain_moe.py --config RECIPE.yaml --mock-data     # one rank
    python pretrain_moe.py --config RECIPE.yaml --dry-run --world-size 1024 [--build --rank 17]
    python pretrain_moe.py --config RECIPE.yaml --check --world-size 2    # as launchers do first

``--help`` lists every setting. Exit codes: 0 done, 2 something for the user to change, 1 our fault
or the machine's, 75 stopped by a signal after a good save (the same command goes on).
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from moetron.common.errors import UserError
from moetron.data.stream.mock_stream import ENDLESS, MockStream
from moetron.data.stream.open_streams import open_training, open_validation
from moetron.data.stream.stages import StagedStream, refuse_repetition
from moetron.moe.checkpoint.compatibility import check_folders
from moetron.moe.checkpoint.run_folder import latest_step
from moetron.moe.config.command import Command, load
from moetron.moe.config.schema.derived import total_samples, with_tokenizer, with_vocabulary
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.moe.monitoring.start_banner import announce, opening
from moetron.moe.plan.render import render
from moetron.moe.training.sample_stream import SourceUse, StreamFrom, Streams
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.run_copy import keep, name_of, open_named


def main() -> int:
    """Parse and check, then plan or pretrain; returns the exit code."""
    command = load(sys.argv[1:])
    for note in command.notes if command.rank == 0 or command.dry_run else []:
        print(f"note: {note}", file=sys.stderr)
    tokenizer = open_tokenizer(command.settings)
    vocab_size = vocabulary(command.settings, tokenizer)
    if command.dry_run:
        return plan(command, vocab_size)
    streams = open_streams(command.settings, vocab_size, tokenizer)
    settings = with_vocabulary(command.settings, vocab_size)  # so that checkpoints tell it
    check_folders(settings, streams.training.state())
    if command.check:
        opening(settings, streams.training.state())  # raises where nothing is left to train
        return 0
    settings = keep_tokenizer(settings, tokenizer)
    announce(settings, streams.training.state())
    return pretrain(settings, vocab_size, streams)


def plan(command: Command, vocab_size: int) -> int:
    """Print what the run would be."""
    print(render(command.settings, vocab_size, command.world_size, command.rank))
    if command.build:
        quieten_libraries()
        from moetron.moe.verify.dry_run import render_share  # torch: seconds

        print(render_share(command.settings, vocab_size, command.world_size, command.rank))
    return 0


def pretrain(settings: Settings, vocab_size: int, streams: Streams) -> int:
    """Start the ranks, build, load, train."""
    quieten_libraries()
    from moetron.moe.training import build_trainer as build  # torch: seconds, after the checks
    from moetron.moe.training import resilience, runtime

    with runtime.running(settings) as ranks:
        trainer = build.build_trainer(settings, ranks, vocab_size)
        loop = build.build_loop(trainer, streams)
        with resilience.StopSignal() as stop:
            stopped = loop.run(stop)
    return resilience.stopped(settings.checkpoint.save) if stopped else 0


def open_tokenizer(settings: Settings) -> Tokenizer | None:
    """The tokenizer, where one is named."""
    source = settings.data.tokenizer_model
    return None if source is None else open_named(source, settings.checkpoint.load)


def keep_tokenizer(settings: Settings, tokenizer: Tokenizer | None) -> Settings:
    """Copy the tokenizer into --save, from rank 0; returns settings that name the copy."""
    save = settings.checkpoint.save
    if save is None or tokenizer is None:
        return settings
    if os.environ.get("RANK", "0") == "0":
        try:
            keep(tokenizer, Path(save), replace=latest_step(Path(save)) is None)
        except (UserError, OSError) as error:
            raise UserError(f"--save {save}: {error}") from error
    return with_tokenizer(settings, name_of(tokenizer, Path(save)))


def vocabulary(settings: Settings, tokenizer: Tokenizer | None) -> int:
    """Size of the vocabulary before padding: as set, else the tokenizer's."""
    size = settings.model.vocab_size
    if tokenizer is None:
        assert size is not None, "checks refuse a run without both"
        return size
    if size is not None and size < tokenizer.vocab_size:
        raise UserError(
            f"--vocab-size {size}: the tokenizer {settings.data.tokenizer_model} has "
            f"{tokenizer.vocab_size} pieces; leave it out or give at least that"
        )
    return size or tokenizer.vocab_size


def open_streams(settings: Settings, vocab_size: int, tokenizer: Tokenizer | None) -> Streams:
    """Numbered samples for training and validation."""
    data, length, seed = settings.data, settings.model.seq_length, settings.training.seed
    wanted = settings.validation.eval_iters > 0
    if data.mock_data or not data.planned_stages():
        mock = MockStream(seed, vocab_size, length)
        return Streams(mock, StreamFrom(mock, ENDLESS // 2) if wanted else None)
    assert tokenizer is not None, "checks refuse shards without it"
    training = open_training(data, length, seed, tokenizer)
    refuse_repetition(training, total_samples(settings), data.max_epochs, data.epoch_caps())
    validation = None
    if wanted and data.valid_data_path is not None:
        validation = open_validation(data, data.valid_data_path, length, tokenizer)
    return Streams(training, validation, list(source_uses(training, total_samples(settings))))


def source_uses(stream: StagedStream, samples: int) -> Iterator[SourceUse]:
    """What a run of so many samples takes of each source."""
    uses = stream.uses(samples)
    for number, name in enumerate(stream.source_names):
        mine = [use for use in uses if use.source == number]
        yield SourceUse(name, sum(use.tokens for use in mine), sum(use.epochs for use in mine))


if __name__ == "__main__":  # megatron-core's checkpoint writer spawns processes
    from moetron.moe.training.resilience import run_guarded

    sys.exit(run_guarded(main))
