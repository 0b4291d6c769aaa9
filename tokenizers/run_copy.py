"""Copy of the tokenizer in a run's folder, so that the folder is self-contained.

``RUN/tokenizer/`` holds the tokenizer's files and its fingerprint. It is written once, before the
first step, and verified at every use.
"""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from moetron.common.errors import UserError
from moetron.common.files import atomic_file, rename, write_text
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_known_tokenizer, load_tokenizer

FOLDER = "tokenizer"
FINGERPRINT = "fingerprint"


def copy_path(run_folder: Path) -> Path:
    """Return the absolute path of a run's copy."""
    return run_folder.resolve() / FOLDER


def name_of(tokenizer: Tokenizer, run_folder: Path) -> str:
    """Return the ``--tokenizer-model`` value of a run's copy; ``bytes`` needs none."""
    return str(copy_path(run_folder)) if tokenizer.files else tokenizer.name


def keep(tokenizer: Tokenizer, run_folder: Path, replace: bool) -> None:
    """Write ``run_folder/tokenizer`` atomically; call it from one process only.

    Args:
        tokenizer: The run's tokenizer; one without files is not copied.
        run_folder: Existing folder.
        replace: Replace another tokenizer there, which no checkpoint needs.

    Raises:
        UserError: another tokenizer, or a damaged copy, exists, or the files changed since
            ``tokenizer`` was read.
        OSError: the folder cannot be written.
    """
    if not tokenizer.files:
        return
    target = copy_path(run_folder)
    if target.exists():
        if _holds(target, tokenizer.fingerprint):
            return
        if not replace:
            raise UserError(
                f"{target}: not this tokenizer ({tokenizer.name}), or was changed; the checkpoints "
                "beside it were trained with the original: give that --tokenizer-model, or "
                "another folder to --save"
            )
    temporary = target.with_name(FOLDER + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, path in tokenizer.files.items():
        with atomic_file(temporary / name) as file:
            file.write(path.read_bytes())
    write_text(temporary / FINGERPRINT, tokenizer.fingerprint + "\n")
    if not _holds(temporary, tokenizer.fingerprint):
        shutil.rmtree(temporary)
        raise UserError(f"tokenizer {tokenizer.name}: its files changed during use")
    shutil.rmtree(target, ignore_errors=True)
    rename(temporary, target)


def find_copy(path: Path) -> Path | None:
    """Return the copy of ``path``, a run's folder or one of its step folders, or None."""
    path = path.resolve()
    folder = (path.parent if path.name.startswith("step_") else path) / FOLDER
    return folder if (folder / FINGERPRINT).is_file() else None


def load_copy(copy: Path) -> Tokenizer:
    """Load the tokenizer of a copy.

    Raises:
        UserError: the copy is damaged, or was changed.
    """
    expected = (copy / FINGERPRINT).read_text(encoding="utf-8").strip()
    tokenizer = load_tokenizer(copy)
    if tokenizer.fingerprint != expected:
        raise UserError(
            f"{copy}: was changed: not the tokenizer that the run was trained with; restore it, or "
            "give --tokenizer-model"
        )
    return tokenizer


def load_run_tokenizer(
    path: Path, given: str | None, saved: str | None, fingerprints: Collection[str]
) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        path: A run's folder or a step folder.
        given: Value of ``--tokenizer-model``; None: the run's copy, else ``saved``.
        saved: Value in the run's settings.
        fingerprints: Fingerprints of the training data's tokenizer; empty: unknown.

    Raises:
        UserError: the tokenizer does not exist, is damaged, or is another one.
    """
    copy = find_copy(path)
    if given is not None or copy is None:
        return load_known_tokenizer(given if given is not None else saved, fingerprints)
    load_copy(copy)
    return load_known_tokenizer(str(copy), fingerprints)


def open_named(source: str, load: str | None) -> Tokenizer:
    """Load a run's tokenizer; if it no longer exists, the copy of the run that it resumes.

    Args:
        source: Value of ``--tokenizer-model``.
        load: Value of ``--load``.

    Raises:
        UserError: neither exists, or the copy is damaged.
    """
    try:
        missing = source != "bytes" and not Path(os.path.expanduser(source)).exists()  # noqa: PTH111
    except OSError:
        missing = True
    copy = find_copy(Path(load)) if load is not None else None
    return load_copy(copy) if missing and copy is not None else load_tokenizer(source)


def _holds(folder: Path, fingerprint: str) -> bool:
    """Return whether a folder's tokenizer has this fingerprint."""
    try:
        return load_tokenizer(folder).fingerprint == fingerprint
    except (UserError, OSError):
        return False
