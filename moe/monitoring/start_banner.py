"""What a run says of itself before it starts: where it begins, and what changed on the way."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.moe.checkpoint.compatibility import changed_data
from moetron.moe.checkpoint.run_folder import Record, find, latest_step, read_record
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.settings import Settings

_OWN = ("checkpoint", "logging", "validation")
"""Groups of settings that say nothing about what is trained."""
_WIDTH = 80
"""Characters of a value that is shown."""


def announce(settings: Settings, stream_state: Mapping[str, Any]) -> None:
    """Print ``opening``, from rank 0; imports no torch.

    Raises:
        UserError: the checkpoint lies behind the last step.
    """
    lines = opening(settings, stream_state)
    if lines and os.environ.get("RANK", "0") == "0":
        print("\n".join(lines), flush=True)


def opening(settings: Settings, stream_state: Mapping[str, Any]) -> list[str]:
    """Where a run begins, each setting that its checkpoint was trained with otherwise, and a
    warning where nothing will be kept. ``stream_state``: what identifies the samples.

    Raises:
        UserError: the checkpoint lies behind the last step.
    """
    options, lines = settings.checkpoint, []
    if options.save is None:
        lines.append("no --save FOLDER: nothing of this run is kept, whatever ends it")
    if options.load is None:
        return lines
    path = Path(options.load)
    if options.load == options.save and latest_step(path) is None:
        return lines
    folder = find(path)
    if options.finetune or options.reset_progress:
        kept = "weights alone" if options.finetune else "weights and optimizer"
        return [*lines, f"starting at step 0 from {folder}: {kept}"]
    return [*lines, *_going_on(folder, read_record(folder), settings, stream_state)]


def _going_on(
    folder: Path, record: Record, settings: Settings, stream_state: Mapping[str, Any]
) -> Iterator[str]:
    step, last = record.progress.step, settings.training.train_iters
    if step > last:
        raise UserError(
            f"--train-iters {last}: {folder} is at step {step} already; give more than that, or "
            "--load an earlier step_* folder"
        )
    yield f"going on from {folder}, {record.progress.consumed_tokens:,} tokens"
    if step == last:
        yield f"nothing is left to train: --train-iters {last} is reached"
    elif step > 0:
        yield from _changes(record, settings)
        if changed := changed_data(record, stream_state):
            number = record.progress.consumed_samples
            yield f"  other data ({', '.join(changed)}): sample {number:,} of them comes next"


def _changes(record: Record, settings: Settings) -> Iterator[str]:
    """One line for each setting that differs; those that the checkpoint does not know are new.

    Where the tokenizer lies may differ: its fingerprint is compared elsewhere.
    """
    for group, fields in settings.model_dump(mode="json").items():
        before = {} if group in _OWN else record.settings.get(group, {})
        for name, value in fields.items():
            if name in before and before[name] != value and name != "tokenizer_model":
                yield f"  {flag_name(name)} {_text(value)} (was {_text(before[name])})"


def _text(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
