"""Checkpoint folders on disk: names, contents, the latest one, deletion.

A run's folder holds ``step_0000100/`` and the like, and ``latest``, a text file with the name of
the one to resume from. A folder holds the tensors' files, the settings, ``run.json`` (`Record`),
and the sums of all of them (checksums.py). It is written as ``step_0000100.tmp`` and renamed when
everything in it is on disk; ``latest`` moves after that. So a folder without ``.tmp`` is complete,
``latest`` names a complete one, and a crash leaves a ``.tmp`` or a complete folder that ``latest``
does not name yet. Nothing here communicates.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moetron.common.errors import UserError
from moetron.common.files import read_regular, rename, sync_folder, write_text
from moetron.common.json_files import parse_object
from moetron.moe.checkpoint.checksums import SUMS, Known, changed, read_sums, share, write_sums
from moetron.moe.checkpoint.index_reader import SHARD, read_index
from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.schema.settings import Settings
from moetron.moe.config.validate import validate

FORMAT = 1
RECORD = "run.json"
EMBEDDING = "embedding.word_embeddings.weight"
LATEST = "latest"
_NAME = re.compile(r"step_(\d{7,})")
logger = logging.getLogger(__name__)


class DamagedError(UserError):
    """A checkpoint is incomplete, or not what was written."""


@dataclass(frozen=True)
class Record:
    """Contents of ``run.json``."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    progress: Progress
    settings: dict[str, dict[str, Any]]
    """The settings tree as JSON."""
    layout: dict[str, Any]
    """World size, parallel sizes, and the number of layers of each pipeline chunk."""
    stream: dict[str, Any]
    """Identity of the stream of samples."""
    versions: dict[str, str]
    files: dict[str, int]
    """Size in bytes of every other file of the folder."""


_RECORD = TypeAdapter(Record)


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder."""

    folder: Path
    record: Record
    keys: frozenset[str]
    """Names of its tensors."""
    embedding_rows: int | None
    """Rows of the vocabulary with padding; None: it holds no embedding."""


_PORTABLE = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_experts_impl": "auto",
    "moe_shared_expert_overlap": False,
}
"""Values of settings of experts that run on any machine."""


def one_rank_settings(record: Record, cpu_threads: int = 0) -> Settings:
    """Return the settings of a checkpoint of any layout, for a single rank of any machine.

    Layout, fusions, dispatcher and implementations that need a GPU are not those of the run.

    Args:
        record: the checkpoint's.
        cpu_threads: of this process; those of the training machine do not apply.

    Raises:
        UserError: another version of Moetron wrote settings that are invalid here.
    """
    here = {"parallel": {"cpu_threads": cpu_threads}, "performance": {}}
    settings, problems, _ = validate({**record.settings, **here})
    if settings is None or problems:
        version = record.versions.get("moetron", "unknown")
        raise UserError(
            f"the checkpoint's settings are of another Moetron (version {version}); use it, or:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    model, moe = settings.model, settings.moe
    if model.transformer_impl == "transformer_engine":
        model = model.model_copy(update={"transformer_impl": "auto"})
    return settings.model_copy(update={"model": model, "moe": moe.model_copy(update=_PORTABLE)})


def step_folder(run_folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return run_folder / f"step_{step:07d}"


def temporary_folder(folder: Path) -> Path:
    """Return the folder in which a checkpoint is written before it is complete."""
    return folder.with_name(folder.name + ".tmp")


def saved_steps(run_folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run, in order."""
    if not run_folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in run_folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def latest_step(run_folder: Path) -> int | None:
    """Return the step that ``latest`` names; without that file, the last complete checkpoint's."""
    try:
        name = read_regular(run_folder / LATEST).decode().strip()
    except FileNotFoundError:
        return max(saved_steps(run_folder), default=None)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{run_folder / LATEST} cannot be read: {error}") from error
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{run_folder / LATEST} holds {name[:80]!r}, not the name of a checkpoint")
    return int(match[1])


def find(path: Path) -> Path:
    """Return the step folder for ``--load path``: ``path`` itself, or a run's latest checkpoint."""
    if not path.is_dir():
        raise UserError(f"--load {path}: no such folder")
    if _NAME.fullmatch(path.name):
        return path
    step = latest_step(path)
    if step is None:
        raise UserError(
            f"--load {path}: holds no checkpoint (neither a `{LATEST}` file nor a step_* folder); "
            "give a run's --save folder or one of its step_* folders"
        )
    folder = step_folder(path, step)
    if not folder.is_dir():
        raise UserError(f"--load {path}: `{LATEST}` names {folder.name}, which is not there")
    return folder


def candidates(path: Path, fallback: bool) -> list[Path]:
    """Return the step folders to try for ``--load path``, the newest first.

    Without ``fallback``, and if ``path`` is a step folder, the only one is that of `find`.
    """
    if fallback and not _NAME.fullmatch(path.name) and (steps := saved_steps(path)):
        return [step_folder(path, step) for step in reversed(steps)]
    return [find(path)]


def find_readable(path: Path, fallback: bool, sizes: bool = True) -> Path:
    """Return the first of `candidates` with a right record (and file sizes), or the last one."""
    *others, last = candidates(path, fallback)
    for folder in others:
        try:
            verify_files(folder, read_record(folder), None if sizes else ())
        except DamagedError:
            continue
        return folder
    return last


def verify_all(path: Path) -> dict[Path, str | None]:
    """Verify all checkpoints of a run, or one step folder; return the damage, None of sound ones.

    The newest comes first.
    """
    found: dict[Path, str | None] = {}
    for folder in candidates(path, fallback=True):
        try:
            verify(folder)
            found[folder] = None
        except DamagedError as error:
            found[folder] = str(error)
    return found


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint to ``step_NNNNNNN.damaged``, which nothing reads."""
    aside = folder.with_name(folder.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    rename(folder, aside)


def read(path: Path) -> Checkpoint:
    """Find a checkpoint and check all of it but the tensors; ``UserError`` names the problem.

    Checks the record, the presence and size of every file, the sums of those without tensors, and
    the index, which is read without executing what it names. ``verify`` reads all files.
    """
    folder = find(path)
    record = read_record(folder)
    verify_files(folder, record)
    _refuse_changes(folder, [name for name in record.files if not name.endswith(SHARD)])
    tensors = read_index(folder).state_dict_metadata
    rows = tensors[EMBEDDING].size[0] if EMBEDDING in tensors else None
    return Checkpoint(folder, record, frozenset(tensors), rows)


def verify(folder: Path, reader: int = 0, readers: int = 1, known: Known = None) -> int:
    """Check every file of a step folder against its sum; return the bytes read.

    Reader number ``reader`` of ``readers``, which divide the files, reads only its own part.
    ``known`` are sums of files that it has read already.

    Raises:
        UserError: a file is missing or has changed since it was written; names it.
    """
    record = read_record(folder)
    names = share(record.files, reader, readers)
    verify_files(folder, record, names)  # of a file system that thousands of readers ask
    _refuse_changes(folder, names, known)
    return sum(record.files[name] for name in names)


def verify_files(folder: Path, record: Record, names: Collection[str] | None = None) -> None:
    """Raise ``UserError`` if a file (default: any) is missing or its size has changed."""
    for name in record.files if names is None else names:
        file, size = folder / name, record.files[name]
        if file.is_symlink() or file.resolve().parent != folder.resolve():
            raise damaged(folder, f"{name} leads out of the folder")
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise damaged(folder, f"{name} {state}")
    listed = read_sums(folder).keys() - {RECORD}
    if listed != record.files.keys():
        [name, *_] = sorted(listed ^ record.files.keys())
        raise damaged(folder, f"{SUMS} and {RECORD} disagree about {name}")


def _refuse_changes(folder: Path, names: Collection[str], known: Known = None) -> None:
    try:
        found = changed(folder, names, known)
    except (OSError, ValueError) as error:
        raise damaged(folder, str(error)) from error
    if found:
        raise damaged(folder, f"{', '.join(found)}: the contents do not match {SUMS}")


def damaged(folder: Path, what: str) -> DamagedError:
    """Return the error of a damaged checkpoint; it names the previous one if ``folder`` is last."""
    run_folder, steps = folder.parent, saved_steps(folder.parent)
    remedy = ""
    if len(steps) > 1 and step_folder(run_folder, steps[-1]).name == folder.name:
        before = step_folder(run_folder, steps[-2]).name
        remedy = (
            f"; to resume from {before}, delete {folder.name} and `{LATEST}` in {run_folder}, or "
            "give --load-fallback"
        )
    return DamagedError(f"--load {folder}: damaged: {what}{remedy}")


def read_record(folder: Path) -> Record:
    """Read ``run.json`` of a step folder."""
    path = folder / RECORD
    if not path.is_file():
        raise DamagedError(f"--load {folder}: not a complete checkpoint: {RECORD} is missing")
    _refuse_changes(folder, [RECORD])
    try:
        tree = parse_object(path.read_text(encoding="utf-8"), RECORD)
        if tree.pop("format", None) != FORMAT:
            raise UserError(f"{path}: written by a newer Moetron; update to load it")
        return _RECORD.validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        [first, *_] = error.errors()
        field = ".".join(map(str, first["loc"]))
        raise damaged(folder, f"{RECORD}: {field}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        raise damaged(folder, str(error)) from None


def write_record(folder: Path, record: Record, sums: Mapping[str, str]) -> None:
    """Write ``run.json``, then the sums of all files.

    Args:
        folder: holds everything else.
        record: its ``files`` are all files of the folder.
        sums: sums that are known already.
    """
    tree = {"format": FORMAT, **asdict(record)}
    write_text(folder / RECORD, json.dumps(tree, indent=1, sort_keys=True) + "\n")
    write_sums(folder, sums)


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below ``folder``, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def make_run_folder(run_folder: Path, flag: str = "--save") -> None:
    """Make a run's folder if it is missing; raise ``UserError`` if it is not writable.

    ``flag``: the flag that names it.
    """
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        if not os.access(run_folder, os.W_OK | os.X_OK):
            raise PermissionError("no permission")
    except OSError as error:
        raise UserError(f"{flag} {run_folder}: cannot write there: {error}") from error


def prepare(folder: Path, flag: str = "--save") -> Path:
    """Make an empty temporary folder for a checkpoint and remove leftovers of crashes.

    ``flag``: the flag that names the run's folder.

    Raises ``UserError`` if ``latest`` names this step's checkpoint or a later one. A complete
    folder beyond ``latest`` is a leftover of a crash and is replaced.
    """
    run_folder = folder.parent
    make_run_folder(run_folder, flag)
    try:
        pointed = latest_step(run_folder) if (run_folder / LATEST).exists() else None
        step = int(folder.name.removeprefix("step_"))
        if folder.exists() and pointed is not None and step <= pointed:
            raise UserError(f"{flag} {run_folder}: {folder.name} exists and is never overwritten")
        remove_leftovers(run_folder)
        remove(folder)
        temporary_folder(folder).mkdir()
    except OSError as error:
        raise UserError(f"{flag} {run_folder}: cannot write there: {error}") from error
    return temporary_folder(folder)


def commit(folder: Path, keep_last: int | None, retain_interval: int | None = None) -> None:
    """Rename the temporary folder to the checkpoint, move ``latest``, delete old checkpoints."""
    sync_folder(temporary_folder(folder))
    rename(temporary_folder(folder), folder)
    write_text(folder.parent / LATEST, folder.name + "\n")
    if keep_last is None and retain_interval is None:
        return
    try:
        prune(folder.parent, keep_last or 1, retain_interval)
    except OSError as error:  # the new checkpoint is complete
        logger.warning("%s: cannot delete old checkpoints: %s", folder.parent, error)


def prune(run_folder: Path, keep_last: int, retain_interval: int | None = None) -> None:
    """Delete checkpoints up to the one that ``latest`` names.

    All but the last ``keep_last`` and those whose step is divisible by ``retain_interval``.
    """
    pointed = latest_step(run_folder)
    assert pointed is not None
    assert keep_last > 0
    steps = [step for step in saved_steps(run_folder) if step <= pointed]
    for step in steps[:-keep_last]:
        if retain_interval is None or step % retain_interval:
            remove(step_folder(run_folder, step))


def remove_leftovers(run_folder: Path) -> None:
    """Delete what dead writers left unfinished; the caller owns the folder."""
    for leftover in run_folder.glob("step_*.tmp"):
        shutil.rmtree(leftover)


def remove(folder: Path) -> None:
    """Delete a checkpoint; a crash meanwhile leaves a ``.tmp``, never a partial checkpoint."""
    if folder.exists():
        rename(folder, temporary_folder(folder))
        shutil.rmtree(temporary_folder(folder))


def refuse_to_rewrite(run_folder: Path, step: int) -> None:
    """Raise ``UserError`` if a run that starts at ``step`` would overwrite a longer one."""
    reached = latest_step(run_folder)
    if reached is not None and reached > step:
        raise UserError(
            f"--save {run_folder}: holds a run that reached step {reached}, and this one starts at "
            f"step {step}; resume with --load {run_folder}, without --finetune and "
            "--reset-progress, or name another folder"
        )
