"""Compatibility of checkpoints with settings."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetron.common.errors import UserError
from moetron.common.text import value_text
from moetron.moe.checkpoint.run_folder import (
    Record,
    find_readable,
    latest_step,
    make_run_folder,
    read_record,
    refuse_to_rewrite,
    saved_steps,
    verify_files,
)
from moetron.moe.checkpoint.vocabulary import vocabulary_problem
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.roles import Role
from moetron.moe.config.schema.run import CheckpointSettings
from moetron.moe.config.schema.settings import Settings, with_role
from moetron.moe.megatron.release import installed_release, is_newer

SHAPE = {
    group: tuple(name for name in names if name != "vocab_size")
    for group, names in with_role(Role.SHAPE).items()
}
"""Settings that decide which tensors exist; vocabulary.py compares the vocabulary's size."""
FUNCTION = with_role(Role.FUNCTION)
"""Settings that only --finetune may change."""


def check_folders(settings: Settings, stream_state: Mapping[str, Any]) -> None:
    """Check --load, --save and a reference before the run starts, without torch.

    Only rank 0 reads files, since thousands of ranks may share a disk.

    Raises:
        UserError: nothing to load, damage, another architecture, no permission to save, or --save
            holds a later step than the start of this run.
    """
    options, step, reads = settings.checkpoint, 0, os.environ.get("RANK", "0") == "0"
    if settings.validation.skip_train and starts_run(options):
        raise UserError(f"--load {options.load}: no checkpoint to evaluate")
    if options.load is not None and not starts_run(options):
        folder = find_readable(Path(options.load), options.load_fallback, sizes=reads)
        record = read_record(folder)
        require_fit(folder, record, settings, stream_state)
        if reads:
            verify_files(folder, record)
        step = 0 if options.finetune or options.reset_progress else record.progress.step
    if settings.adaptation.preference_loss is not None and step == 0:
        _check_reference(settings, stream_state)
    if options.save is not None:
        make_run_folder(Path(options.save))
        if not (options.load_fallback and options.load == options.save):
            refuse_to_rewrite(Path(options.save), step)


def _check_reference(settings: Settings, stream_state: Mapping[str, Any]) -> None:
    """Check that preferences have a model to start from, and a reference that fits."""
    options, reference = settings.checkpoint, settings.adaptation.preference_reference_load
    if starts_run(options):
        raise UserError(f"--load {options.load}: no checkpoint: preferences need a trained model")
    if reference is None:
        return
    folder = find_readable(Path(reference), fallback=False)
    record, weights_only = read_record(folder), options.model_copy(update={"finetune": True})
    chosen = settings.model_copy(update={"checkpoint": weights_only})
    require_fit(folder, record, chosen, stream_state, flag="--preference-reference-load")
    if os.environ.get("RANK", "0") == "0":
        verify_files(folder, record)


def starts_run(options: CheckpointSettings) -> bool:
    """Return whether --load equals --save and holds no checkpoint yet: the run starts at step 0."""
    if options.load is None or options.load != options.save:
        return False
    folder = Path(options.load)
    return not saved_steps(folder) if options.load_fallback else latest_step(folder) is None


def require_fit(
    folder: Path,
    record: Record,
    settings: Settings,
    stream_state: Mapping[str, Any],
    embedding_rows: int | None = None,
    flag: str = "--load",
) -> None:
    """Raise ``UserError`` with all differences between a checkpoint, of ``flag``, and settings."""
    problems = differences(record, settings, stream_state, embedding_rows)
    if problems:
        raise UserError("\n".join([f"{flag} {folder}: does not fit:", *problems]))


def differences(
    record: Record,
    settings: Settings,
    stream_state: Mapping[str, Any],
    embedding_rows: int | None = None,
) -> list[str]:
    """Return one line per difference that forbids loading.

    ``embedding_rows``: rows of the checkpoint's embedding, if its tensors are known.
    """
    options = settings.checkpoint
    lists = [SHAPE] if options.finetune else [SHAPE, FUNCTION]
    checked = [(group, name) for part in lists for group in part for name in part[group]]
    if options.no_load_optim:
        checked = [(group, name) for group, name in checked if group != "optimizer"]
    ours = settings.model_dump(mode="json")
    problems = [
        f"  - {flag_name(name)} {value_text(ours[group][name], 'none')}: "
        f"the checkpoint has {value_text(theirs, 'none')}"
        for group, name in checked
        if (theirs := record.settings.get(group, {}).get(name, ours[group][name]))
        != ours[group][name]
    ]
    vocab_size = settings.model.vocab_size
    if vocab_size and (problem := vocabulary_problem(record, vocab_size, embedding_rows)):
        problems.append(f"  - {problem}")
    tokenizers = tokenizer_fingerprints(stream_state), tokenizer_fingerprints(record.stream)
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        new, old = map(value_text, tokenizers)
        problems.append(f"  - tokenizer {new}: the checkpoint has {old}")
    if not options.finetune and (problem := _release_problem(record)):
        problems.append(f"  - {problem}")
    return problems


def _release_problem(record: Record) -> str | None:
    """Return why a run cannot go back to an older megatron-core; forward it can."""
    wrote = record.versions.get("megatron-core", "0")
    if not is_newer(wrote):
        return None
    return (
        f"megatron-core {installed_release()}: the checkpoint was written with {wrote}, and an "
        "older one is not known to resume it identically; use that version (Python 3.12 or "
        "later), or --finetune, which takes only the weights"
    )


def changed_data(record: Record, stream_state: Mapping[str, Any]) -> list[str]:
    """Return the names of parts in which a checkpoint's sample stream differs from this one."""
    ours, theirs = json.loads(json.dumps(stream_state)), record.stream
    return sorted(key for key in theirs | ours if theirs.get(key) != ours.get(key))


def tokenizer_fingerprints(stream_state: Mapping[str, Any]) -> list[str]:
    """Return the fingerprints of the sources' tokenizers."""
    sources = stream_state.get("sources", [])
    return sorted({source["tokenizer"] for source in sources if source.get("tokenizer")})
