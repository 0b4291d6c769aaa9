"""Return of a running job to an earlier checkpoint, leaving out the samples since."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetron.common.errors import UserError
from moetron.common.files import write_text
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.position import Progress
from moetron.moe.checkpoint.save_load import load_checkpoint
from moetron.moe.health.events import FILE, ROLLED_BACK_TO, read_events
from moetron.moe.numerics.scaled_matmul import expire_weights
from moetron.moe.training.sample_stream import SampleStream
from moetron.moe.training.trainer import Trainer


def roll_back(
    trainer: Trainer, stream: SampleStream, progress: Progress
) -> tuple[Progress, Path] | None:
    """Load the checkpoint --spike-rollback-checkpoints back; return the position and the folder.

    The position has the checkpoint's step and the samples after ``progress``: those between the
    checkpoint and ``progress`` are left out. Later checkpoints are deleted. None: the run has no
    checkpoint. Collective over all ranks.
    """
    settings = trainer.settings
    assert settings.checkpoint.save is not None, "rules refuse rollbacks without --save"
    run_folder = Path(settings.checkpoint.save)
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        chosen = [_choose(run_folder, settings.health.spike_rollback_checkpoints)]
    # Broadcast from rank 0, which alone changes the run's folder.
    dist.broadcast_object_list(chosen, src=0)
    [step] = chosen
    if step is None:
        return None
    folder = checkpoint_folder.step_folder(run_folder, step)
    plain = {
        "load": str(folder),
        "finetune": False,
        "reset_progress": False,
        "no_load_optim": False,
        "no_load_rng": False,
    }
    options = settings.checkpoint.model_copy(update=plain)
    settings = settings.model_copy(update={"checkpoint": options})
    load_checkpoint(folder, trainer.chunks, trainer.optimizer, settings, stream.state())
    if settings.precision.fp8_format is not None:
        expire_weights(trainer.chunks)  # the load has changed them in place
    return Progress(step, progress.consumed_samples, progress.consumed_tokens), folder


def _choose(run_folder: Path, back: int) -> int | None:
    """Move ``latest`` back by ``back - 1`` checkpoints and delete those after it."""
    pointed = checkpoint_folder.latest_step(run_folder)
    steps = [s for s in checkpoint_folder.saved_steps(run_folder) if pointed and s <= pointed]
    if not steps:
        return None
    chosen = steps[-min(back, len(steps))]
    name = checkpoint_folder.step_folder(run_folder, chosen).name
    write_text(run_folder / checkpoint_folder.LATEST, f"{name}\n")
    for step in checkpoint_folder.saved_steps(run_folder):
        if step > chosen:
            checkpoint_folder.remove(checkpoint_folder.step_folder(run_folder, step))
    return chosen


def rolled_back_position(folder: Path, progress: Progress) -> tuple[Progress, int]:
    """Return the position of a resume from ``folder`` and the rollbacks of the run so far.

    A run that ended between a rollback to this checkpoint and the next save has the samples that
    it left out in ``events.jsonl`` alone. Collective over all ranks.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        rows = [row for row in read_events(folder.parent / FILE) if ROLLED_BACK_TO in row]
        last = rows[-1] if rows else {}
        if last.get(ROLLED_BACK_TO) == progress.step:
            found = [[last.get(name) for name in ("next_sample", "next_token", "rollbacks")]]
    # Broadcast from rank 0, which alone reads the file.
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return progress, 0
    if not all(type(number) is int and number >= 0 for number in found[0]):
        raise UserError(f"{folder.parent / FILE}: damaged: the last rollback lacks its numbers")
    samples, tokens, rollbacks = found[0]
    return Progress(progress.step, samples, tokens), rollbacks
