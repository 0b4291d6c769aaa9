"""Construction of the trainer and the loop on one rank."""

import io
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from moetron.common.errors import UserError
from moetron.common.files import atomic_file, sha256_of
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.collective_checks import fall_back
from moetron.moe.checkpoint.compatibility import starts_run
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import load_checkpoint, load_weights
from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.derived import looks_ahead
from moetron.moe.config.schema.run import CheckpointSettings
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.device import uses_transformer_engine
from moetron.moe.monitoring.console import Console
from moetron.moe.monitoring.peak_flops import peak_of_rank
from moetron.moe.monitoring.sinks import JsonLines, Sink, open_sinks
from moetron.moe.numerics.scaled_matmul import expire_weights
from moetron.moe.optim.qk_clip import AttentionLogits
from moetron.moe.routing.routing_record import RoutingRecorder
from moetron.moe.training.evaluate import reference_log_probs
from moetron.moe.training.loop import Loop
from moetron.moe.training.model_chunks import build_chunks
from moetron.moe.training.optimizer import build_optimizer
from moetron.moe.training.rollback import rolled_back_position
from moetron.moe.training.runtime import Runtime
from moetron.moe.training.sample_stream import PreferenceStream, Streams
from moetron.moe.training.start_record import FILE, describe
from moetron.moe.training.trainer import Trainer

REFERENCE = "reference_log_probs.npz"
logger = logging.getLogger(__name__)


def build_trainer(settings: Settings, runtime: Runtime, vocab_size: int) -> Trainer:
    """Build the initialised model and its optimizer; warn of routers that see later tokens."""
    for flag in looks_ahead(settings) if runtime.is_main else ():
        logger.warning("%s looks at later tokens: losses flatter the model", flag)
    config = transformer_config(settings, uses_transformer_engine(settings))
    chunks = build_chunks(settings, config, vocab_size, runtime)
    optimizer = build_optimizer(settings, chunks, runtime)
    sparse = settings.moe.num_experts is not None
    recorder = RoutingRecorder(chunks, settings) if sparse else None
    attention, logits = settings.attention, None
    if attention.qk_clip or attention.log_max_attention_logit:
        threshold, alpha = attention.qk_clip_threshold, attention.qk_clip_alpha
        logits = AttentionLogits(chunks, runtime.groups, threshold, alpha)
    return Trainer(settings, runtime, config, vocab_size, chunks, optimizer, recorder, logits)


def build_loop(trainer: Trainer, streams: Streams) -> Loop:
    """Build the loop from step 0, or from the checkpoint of --load.

    The main rank prints the start block and appends it to ``SAVE/starts.jsonl``.
    """
    settings, runtime = trainer.settings, trainer.runtime
    progress, reference = Progress(), settings.adaptation.preference_reference_load
    if settings.checkpoint.load is not None:
        falls_back = settings.checkpoint.load_fallback and not starts_run(settings.checkpoint)
        if falls_back:
            settings = fall_back(settings)
        if reference is not None and not _resumes(settings.checkpoint):
            load_weights(Path(reference), trainer.chunks, trainer.vocab_size)
            set_references(trainer, streams, resumes=False)
            expire_weights(trainer.chunks)  # the load below changes them in place
        path, state = Path(str(settings.checkpoint.load)), streams.training.state()
        progress = load_checkpoint(
            path, trainer.chunks, trainer.optimizer, settings, state, verified=falls_back
        )
    folder = None
    if progress.step > 0:  # of a checkpoint, with its position
        folder = checkpoint_folder.find(Path(str(settings.checkpoint.load)))
        progress, rollbacks = rolled_back_position(folder, progress)
    if settings.adaptation.preference_loss and (reference is None or progress.step > 0):
        set_references(trainer, streams, resumes=progress.step > 0)
    peak = peak_of_rank(settings, runtime.device)
    sinks: list[Sink] = []
    if runtime.is_main:
        start, block = describe(replace(trainer, settings=settings), streams, progress, peak)
        print(block, flush=True)
        last_step = settings.training.train_iters
        console = Console(progress.step, last_step, settings.logging.log_interval)
        sinks = [console, *open_sinks(settings, progress.step)]
        if settings.checkpoint.save is not None:
            starts = JsonLines(Path(settings.checkpoint.save) / FILE, progress.step)
            starts.write(asdict(start))
            starts.close()
    loop = Loop(trainer, streams, progress, sinks, peak)
    if folder is not None:
        loop.health.restore(folder)
        loop.health.rollbacks = max(loop.health.rollbacks, rollbacks)
        loop.health.reruns.resume(folder.parent, progress.step)
    return loop


def _resumes(options: CheckpointSettings) -> bool:
    """Return whether the run continues the one at --load, after its first step."""
    if options.finetune or options.reset_progress:
        return False
    folder = checkpoint_folder.find(Path(str(options.load)))
    return checkpoint_folder.read_record(folder).progress.step > 0


def set_references(trainer: Trainer, streams: Streams, resumes: bool) -> None:
    """Give all streams the reference's log-probabilities: of the current weights.

    They are computed once, and kept in ``SAVE/reference_log_probs.npz`` with the hash of the
    checkpoint that they are of, for a run that resumes. Collective over all ranks.

    Raises:
        UserError: a resumed run has none, or they are of other samples or another checkpoint.
    """
    options = trainer.settings.checkpoint
    source = trainer.settings.adaptation.preference_reference_load
    path = None if options.save is None else Path(options.save) / REFERENCE
    named = {"training": streams.training, "validation": streams.validation}
    used = {n: cast(PreferenceStream, each) for n, each in named.items() if each is not None}
    identity = json.dumps({n: stream.state() for n, stream in used.items()}, sort_keys=True)
    found: dict[str, np.ndarray] = {}
    if resumes:
        if path is None or not path.is_file():
            raise UserError(f"--save: a resumed run with preferences needs its {REFERENCE} there")
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["identity"]) != identity:
                raise UserError(f"{path}: of other samples than --data-path; start a new run")
            if source is not None and str(kept["checkpoint"]) != _fingerprint(source):
                raise UserError(
                    f"{path}: not of --preference-reference-load {source}; leave it out, or start "
                    "a new run"
                )
            found = {n: kept[n] for n in used}
    for name, stream in used.items():
        stream.reference = found[name] if resumes else reference_log_probs(trainer, stream)
        found[name] = stream.reference
    if path is not None and not resumes and trainer.runtime.is_main:
        folder = source or options.load
        of = "random weights" if folder is None else _fingerprint(folder)
        content = io.BytesIO()
        arrays: dict[str, Any] = {"identity": np.array(identity), "checkpoint": np.array(of)}
        np.savez(content, **{**arrays, **found})
        with atomic_file(path) as file:
            file.write(content.getvalue())


def _fingerprint(folder: str) -> str:
    """Return the hash of the sums of a checkpoint's files."""
    return sha256_of(checkpoint_folder.find(Path(folder)) / "SHA256SUMS")
