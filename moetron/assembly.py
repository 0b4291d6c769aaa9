"""Assemble a run from its settings, for `pretrain_moe.py` and `moetron.api`.

Only this module imports tokenizers, data and model together: `moe` sees samples through a protocol
(`moe/training/sample_stream.py`) and never imports `data`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.common.process import report_stop
from moetron.common.run_owner import claim, refuse_owned
from moetron.common.stop_signal import EndAtOnce, StopSignal
from moetron.common.watch import activity
from moetron.common.watch.limits import require_limits
from moetron.data.chat.chat_rows import Kind
from moetron.data.chat.chat_stream import ChatStream, open_chats
from moetron.data.chat.text_to_text_stream import open_text_to_text
from moetron.data.stream.documents import DocumentStream
from moetron.data.stream.id_range import refuse_ids_outside
from moetron.data.stream.mock_spans import MockSpans
from moetron.data.stream.mock_stream import ENDLESS, MOCK_EOD, MockStream
from moetron.data.stream.open_streams import open_training, open_validation
from moetron.data.stream.stages import StagedStream, refuse_repetition
from moetron.moe.checkpoint.compatibility import check_folders
from moetron.moe.checkpoint.run_folder import make_run_folder, remove_leftovers, saved_steps
from moetron.moe.config.machine import expected_device
from moetron.moe.config.schema.derived import total_samples, with_tokenizer, with_vocabulary
from moetron.moe.config.schema.settings import Settings
from moetron.moe.monitoring.library_warnings import quieten_libraries
from moetron.moe.monitoring.sinks import Sink
from moetron.moe.monitoring.start_banner import announce, opening
from moetron.moe.plan.memory import memory_per_rank
from moetron.moe.training.sample_stream import SourceUse, StreamFrom, Streams
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.run_copy import keep, name_of, open_named


def open_tokenizer(settings: Settings) -> Tokenizer | None:
    """Return the tokenizer that the settings name, or None."""
    source = settings.data.tokenizer_model
    return None if source is None else open_named(source, settings.checkpoint.load)


def keep_tokenizer(settings: Settings, tokenizer: Tokenizer | None) -> Settings:
    """Copy the tokenizer into --save, from rank 0; return settings that name the copy."""
    save = settings.checkpoint.save
    if save is None or tokenizer is None:
        return settings
    if os.environ.get("RANK", "0") == "0":
        try:
            keep(tokenizer, Path(save), replace=not saved_steps(Path(save)))
        except (UserError, OSError) as error:
            raise UserError(f"--save {save}: {error}") from error
    return with_tokenizer(settings, name_of(tokenizer, Path(save)))


def vocabulary_size(settings: Settings, tokenizer: Tokenizer | None) -> int:
    """Return the size of the vocabulary before padding: as set, else the tokenizer's.

    Raises:
        UserError: the size is set below the tokenizer's, or neither is known.
    """
    size = settings.model.vocab_size
    if tokenizer is None:
        if size is None:
            raise UserError("--vocab-size: unset and no --tokenizer-model; give one of them")
        return size
    if size is not None and size < tokenizer.vocab_size:
        raise UserError(
            f"--vocab-size {size}: the tokenizer {settings.data.tokenizer_model} has "
            f"{tokenizer.vocab_size} pieces; leave it out or give at least that"
        )
    return size or tokenizer.vocab_size


def open_streams(settings: Settings, vocab_size: int, tokenizer: Tokenizer | None) -> Streams:
    """Open the numbered samples for training and validation.

    Raises:
        UserError: a shard cannot be used, or sources would repeat more often than allowed.
    """
    streams = _open_streams(settings, vocab_size, tokenizer)
    if not settings.data.reset_attention_mask:
        return streams
    eod = MOCK_EOD if settings.data.mock_data or tokenizer is None else tokenizer.eod
    validation = streams.validation
    return replace(
        streams,
        training=DocumentStream(streams.training, eod),
        validation=None if validation is None else DocumentStream(validation, eod),
    )


def _open_streams(settings: Settings, vocab_size: int, tokenizer: Tokenizer | None) -> Streams:
    if settings.adaptation.sft:
        assert tokenizer is not None, "checks refuse shards without it"
        return open_chat_streams(settings, vocab_size, tokenizer)
    data, length, seed = settings.data, settings.model.seq_length, settings.training.seed
    wanted = settings.validation.eval_iters > 0
    if data.mock_data or not data.planned_stages():
        mock = _mock(settings, vocab_size)
        return Streams(mock, StreamFrom(mock, ENDLESS // 2) if wanted else None)
    assert tokenizer is not None, "checks refuse shards without it"
    training = open_training(data, length, seed, tokenizer)
    training.limit_ids(vocab_size)
    if (data.reset_attention_mask or data.eod_mask_loss) and (endless := training.without_ends()):
        flag = "--reset-attention-mask" if data.reset_attention_mask else "--eod-mask-loss"
        raise UserError(
            f"{flag}: documents without an end-of-document token cannot be told apart: "
            f"{', '.join(endless)}; preprocess again with --append-eod, or leave the flag out"
        )
    refuse_repetition(training, total_samples(settings), data.max_epochs, data.epoch_caps())
    validation = None
    if wanted and data.valid_data_path is not None:
        most = settings.validation.eval_iters * settings.training.global_batch_size
        validation = open_validation(data, data.valid_data_path, length, tokenizer, most)
        validation.limit_ids(vocab_size)
    return Streams(training, validation, list(source_uses(training, total_samples(settings))))


def _mock(settings: Settings, vocab_size: int) -> MockStream | MockSpans:
    """Return synthetic samples for the model."""
    data, length, seed = settings.data, settings.model.seq_length, settings.training.seed
    if settings.model.encoder_num_layers is None:
        return MockStream(seed, vocab_size, length)
    assert data.encoder_seq_length is not None, "checks refuse encoder-decoders without it"
    shape = data.noise_density, data.mean_noise_span_length, data.examples_per_sample
    return MockSpans(seed, vocab_size, length, data.encoder_seq_length, shape)


_ROWS: dict[str | None, Kind] = {"dpo": "pairs", "dpo_norm": "pairs", "kto": "labelled"}
"""Rows of the losses on preferences."""


def open_chat_streams(settings: Settings, vocab_size: int, tokenizer: Tokenizer) -> Streams:
    """Open the shards of chats, or of inputs and targets, for training and validation.

    Raises:
        UserError: a shard cannot be used, or chats would repeat more often than allowed.
    """
    data, chosen = settings.data, settings.adaptation
    length, encoder = settings.model.seq_length, data.encoder_seq_length

    def opened(path: Sequence[str], seed: int | None) -> ChatStream:
        prefixes = data.rooted(path)
        rest = (
            tokenizer.fingerprint,
            tokenizer.pad,
            seed,
            chosen.sft_packing,
            chosen.sft_loss_normalisation,
        )
        stream = (
            open_chats(prefixes, length, *rest, _ROWS.get(chosen.preference_loss, "chats"))
            if encoder is None
            else open_text_to_text(prefixes, (encoder, length - encoder), *rest)
        )
        refuse_ids_outside(stream.token_shards, vocab_size)
        return stream

    training, samples = (
        opened(data.data_path or [], settings.training.seed),
        total_samples(settings),
    )
    uses = [SourceUse(*use) for use in training.uses(samples)]
    if data.max_epochs is not None and (most := max(use.epochs for use in uses)) > data.max_epochs:
        raise UserError(
            f"--max-epochs {data.max_epochs:g}: the run of {samples:,} samples repeats the chats "
            f"{most:.3f} times, {training.rows_per_epoch:,} samples each; shorten the run"
        )
    wanted = settings.validation.eval_iters > 0 and data.valid_data_path is not None
    validation = opened(data.valid_data_path or [], None) if wanted else None
    return Streams(training, validation, uses)


def source_uses(stream: StagedStream, samples: int) -> Iterator[SourceUse]:
    """Yield the tokens and epochs of each source in a run of ``samples`` samples."""
    uses = stream.uses(samples)
    for number, name in enumerate(stream.source_names):
        mine = [use for use in uses if use.source == number]
        yield SourceUse(name, sum(use.tokens for use in mine), sum(use.epochs for use in mine))


def train(
    settings: Settings,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    sinks: Sequence[Sink] = (),
    check_only: bool = False,
    early: EndAtOnce | None = None,
) -> int:
    """Open the samples, check checkpoint folders, train; return the exit code.

    Args:
        settings: checked.
        tokenizer: the one that they name.
        vocab_size: before padding.
        sinks: see `pretrain`.
        check_only: stop before any rank starts.
        early: ends this process on a signal before the first step.

    Raises:
        UserError: the samples or a checkpoint cannot be used, another run owns --save, or no step
            is left to train.
    """
    streams = open_streams(settings, vocab_size, tokenizer)
    settings = with_vocabulary(settings, vocab_size)  # so that checkpoints state it
    if settings.checkpoint.save is not None and os.environ.get("RANK", "0") == "0":
        refuse_owned(Path(settings.checkpoint.save))
    check_folders(settings, streams.training.state())
    check_limits(settings, vocab_size)
    if check_only:
        opening(settings, streams.training.state())  # raises where no step is left
        return 0
    with owning(settings.checkpoint.save, early) as require_owner:
        settings = keep_tokenizer(settings, tokenizer)
        announce(settings, streams.training.state())
        return pretrain(settings, vocab_size, streams, sinks, require_owner)


def check_limits(settings: Settings, vocab_size: int) -> None:
    """Refuse limits of the system that would break the run later.

    Raises:
        ConfigError: a line for each of them.
    """
    ranks, here = (int(os.environ.get(n, "1")) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    state_bytes, gpus = 0, expected_device(settings.parallel.device) == "cuda"
    if not gpus:
        memory = memory_per_rank(settings, vocab_size, ranks, stage=0)
        state_bytes = memory.parameters + memory.gradients + memory.optimizer
    require_limits(ranks, here, settings.data.num_workers, state_bytes, gpus)


def _news() -> dict[str, Any]:
    """Return what the run is doing, for monitors that read ``owner.json``."""
    now = activity.current()
    return {"step": now.step, "activity": now.name}


@contextmanager
def owning(save: str | None, early: EndAtOnce | None) -> Iterator[Callable[[], None]]:
    """Own the --save folder, from rank 0; yield a check that this still holds."""
    if save is None or os.environ.get("RANK", "0") != "0":
        yield lambda: None
        return
    make_run_folder(Path(save))
    ownership = claim(Path(save), _news)
    if early is not None:
        early.cleanups.append(ownership.release)
    try:
        remove_leftovers(Path(save))
        yield ownership.require
    finally:
        ownership.release()


def pretrain(
    settings: Settings,
    vocab_size: int,
    streams: Streams,
    sinks: Sequence[Sink] = (),
    require_owner: Callable[[], None] = lambda: None,
) -> int:
    """Start the ranks, build the model, load a checkpoint, train; return the exit code.

    Args:
        settings: validated.
        vocab_size: before padding.
        streams: training and validation samples.
        sinks: receive the metrics in addition to the sinks in the settings; main rank only.
        require_owner: raises in each step if another run has taken --save over.
    """
    quieten_libraries()
    from moetron.moe.training import build_trainer, runtime  # torch: seconds

    with runtime.running(settings) as ranks:
        trainer = build_trainer.build_trainer(settings, ranks, vocab_size)
        loop = build_trainer.build_loop(trainer, streams)
        loop.sinks += sinks if ranks.is_main else []
        with StopSignal() as stop:

            def stop_requested() -> bool:
                require_owner()
                return stop()

            stopped = loop.run(stop_requested)
    return report_stop(settings.checkpoint.save) if stopped else 0
