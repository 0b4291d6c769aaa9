"""Construction of the trainer and the loop on one rank."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.collective_checks import fall_back
from moetron.moe.checkpoint.compatibility import starts_run
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import load_checkpoint
from moetron.moe.config.bridge import transformer_config
from moetron.moe.config.schema.derived import looks_ahead
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.device import uses_transformer_engine
from moetron.moe.monitoring.console import Console
from moetron.moe.monitoring.peak_flops import peak_of_rank
from moetron.moe.monitoring.sinks import JsonLines, Sink, open_sinks
from moetron.moe.optim.qk_clip import AttentionLogits
from moetron.moe.routing.routing_record import RoutingRecorder
from moetron.moe.training.loop import Loop
from moetron.moe.training.model_chunks import build_chunks
from moetron.moe.training.optimizer import build_optimizer
from moetron.moe.training.rollback import rolled_back_position
from moetron.moe.training.runtime import Runtime
from moetron.moe.training.sample_stream import Streams
from moetron.moe.training.start_record import FILE, describe
from moetron.moe.training.trainer import Trainer

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
    progress = Progress()
    if settings.checkpoint.load is not None:
        falls_back = settings.checkpoint.load_fallback and not starts_run(settings.checkpoint)
        if falls_back:
            settings = fall_back(settings)
        path, state = Path(str(settings.checkpoint.load)), streams.training.state()
        progress = load_checkpoint(
            path, trainer.chunks, trainer.optimizer, settings, state, verified=falls_back
        )
    folder = None
    if progress.step > 0:  # of a checkpoint, with its position
        folder = checkpoint_folder.find(Path(str(settings.checkpoint.load)))
        progress, rollbacks = rolled_back_position(folder, progress)
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
