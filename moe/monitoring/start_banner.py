"""Start of a run, and differences of settings and data from its checkpoint."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.common.text import value_text
from moetron.moe.checkpoint.compatibility import changed_data, starts_run
from moetron.moe.checkpoint.run_folder import Record, find_readable, read_record
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.roles import Role
from moetron.moe.config.schema.settings import ROLES, Settings

_WIDTH = 80
"""Characters of a value that is shown."""


def announce(settings: Settings, stream_state: Mapping[str, Any]) -> None:
    """Print ``opening`` from rank 0, without torch.

    Raises:
        UserError: the checkpoint is past the last step.
    """
    lines = opening(settings, stream_state)
    if lines and os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), flush=True)


def opening(settings: Settings, stream_state: Mapping[str, Any]) -> list[str]:
    """Return the differences between a run and the checkpoint that it resumes from.

    One line per setting and one for data; none for a run that does not resume or trains no step.
    ``stream_state``: identity of the samples.

    Raises:
        UserError: the checkpoint is past the last step.
    """
    folder, options = _checkpoint(settings), settings.checkpoint
    trains = not settings.validation.skip_train
    if folder is None or options.finetune or options.reset_progress or not trains:
        return []
    lines = list(_differences(folder, read_record(folder), settings, stream_state))
    return [f"changed since {folder}:", *lines] if lines else []


def origin(settings: Settings) -> str:
    """Return the source of weights and position: random weights or a checkpoint."""
    folder, options = _checkpoint(settings), settings.checkpoint
    if settings.validation.skip_train:
        return f"the weights of {folder}, for evaluation"
    if folder is None:
        return f"random weights, seed {settings.training.seed}"
    if options.finetune:
        return f"the weights of {folder}, at step 0"
    if options.reset_progress:
        return f"weights and optimizer of {folder}, at step 0"
    progress = read_record(folder).progress
    if progress.step == settings.training.train_iters:
        return f"{folder}: --train-iters {progress.step:,} is reached, nothing is left to train"
    return f"{folder}: resumes at step {progress.step:,}, {progress.consumed_tokens:,} tokens"


def _checkpoint(settings: Settings) -> Path | None:
    """Return the checkpoint to load, or None for a new run (with --load, if it equals --save).

    Raises:
        UserError: --load has no checkpoint.
    """
    options = settings.checkpoint
    if options.load is None:
        return None
    if starts_run(options):
        return None
    return find_readable(Path(options.load), options.load_fallback)


def _differences(
    folder: Path, record: Record, settings: Settings, stream_state: Mapping[str, Any]
) -> Iterator[str]:
    step, last = record.progress.step, settings.training.train_iters
    if step > last:
        raise UserError(
            f"--train-iters {last}: {folder} is at step {step} already; give more than that, or "
            "--load an earlier step_* folder"
        )
    if 0 < step < last:
        yield from _changes(record, settings)
        if changed := changed_data(record, stream_state):
            number = record.progress.consumed_samples
            yield f"  other data ({', '.join(changed)}): sample {number:,} of them comes next"


def _changes(record: Record, settings: Settings) -> Iterator[str]:
    """Yield one line for each setting that differs and is also in the checkpoint."""
    tree = settings.model_dump(mode="json")
    for (group, name), role in ROLES.items():
        before, value = record.settings.get(group, {}), tree[group][name]
        if role is not Role.RUN and name in before and before[name] != value:
            yield f"  {flag_name(name)} {_text(value)} (was {_text(before[name])})"


def _text(value: Any) -> str:
    text = value_text(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
