"""Find the input files, and reject unreadable ones."""

import glob
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moetron.common.errors import UserError
from moetron.common.files import is_utf8
from moetron.data.readers.rows import text_suffix
from moetron.data.readers.standard_input import copy_path
from moetron.data.readers.tables import TABLE_SUFFIXES
from moetron.data.shards.manifest import read_manifest
from moetron.data.shards.shard_set import is_written_with

FOREIGN_SUFFIXES = {
    *(".bin", ".idx", ".npy", ".npz", ".pt", ".pkl", ".orc", ".avro", ".feather"),
    *(".zip", ".tar", ".tgz", ".xz", ".lzma", ".bz2", ".lz4", ".br", ".7z", ".rar", ".zstd"),
}
SAVED_STATE = "state.json"
DATASET_NOTES = {"dataset_info.json", "dataset_dict.json", SAVED_STATE}
"""Files that HuggingFace's ``save_to_disk`` writes beside its Arrow files."""
PACKAGES = {".zst": ("zstandard", "zstd"), ".parquet": ("pyarrow", "arrow")}
PACKAGES[".arrow"] = PACKAGES[".parquet"]


def find_files(patterns: Sequence[str], outputs: Sequence[str] = ()) -> list[Path]:
    """Find the files of paths, folders (recursively) and globs, sorted, each once.

    Files that runs with the prefixes ``outputs`` wrote are skipped, so that they may be in a folder
    of inputs; a file that such a run would overwrite is rejected.

    Raises UserError with all problems: nothing matches, or a file has an unsupported format.
    """
    problems, found = [], set[Path]()
    for pattern in patterns:
        files = _match(pattern)
        if not files:
            problems.append(_nothing(pattern))
        found.update(files)
    inputs = []
    for file in sorted(found):
        prefix = next((name for name in outputs if is_written_with(file, name)), None)
        named = str(file) in patterns
        if prefix is None or (named and file == copy_path(prefix)):
            inputs.append(file)
        elif named or not _is_ours(file):
            problems.append(
                f"--input {file}: the run would overwrite it; choose another prefix than {prefix}"
            )
    inputs = _each_once(inputs)
    problems += [f"{file}: {problem}" for file in inputs if (problem := _unreadable(file))]
    if not inputs and not problems:
        problems.append(f"--input {' '.join(patterns)}: contains only output of an earlier run")
    if problems:
        raise UserError("\n".join(problems))
    return inputs


def _is_ours(file: Path) -> bool:
    """Return whether a file with an output's name is one: of JSON files, only manifests are."""
    if file.suffix != ".json" or file.name.endswith(".progress.json"):
        return True
    try:
        return read_manifest(file.with_suffix("")) is not None
    except UserError:
        return False


def _each_once(files: Iterable[Path]) -> list[Path]:
    """Return sorted files; of several names of one file, the one that is no link, or the first."""
    names: dict[str, Path] = {}
    for file in files:
        real = os.path.realpath(file)
        if real not in names or str(file.absolute()) == real:
            names[real] = file
    return sorted(names.values())


def _nothing(pattern: str) -> str:
    """Return the message for a pattern that matches no file."""
    path = Path(pattern)
    if path.is_fifo() or path.is_char_device():
        return f"--input {pattern}: a pipe or device; give - and redirect: --input - < {pattern}"
    return f"--input {pattern}: no such file, nor a folder or glob with files"


def _match(pattern: str) -> list[Path]:
    """Return the files of one pattern; a matched folder means the files below it."""
    path = Path(os.path.expanduser(pattern))  # noqa: PTH111 - Path's raises for ~nobody
    if path.is_dir():
        return _below(path)
    if os.path.lexists(path) and not path.is_fifo() and not path.is_char_device():
        return [path]
    found = []
    for name in map(Path, glob.glob(str(path), recursive=True)):  # noqa: PTH207 - Path.glob refuses absolute ones
        if name.is_dir() and "**" not in pattern:
            found += _below(name)
        elif name.is_file() or _is_broken(name):
            found.append(name)
    return found


def _below(folder: Path) -> list[Path]:
    """Return the files with documents below a folder.

    Hidden files, a saved dataset's notes and caches (HuggingFace) and the attributes of documents
    (Dolma: ``attributes`` beside ``documents``) are skipped.
    """
    files = [file for file in _walk(folder) if file.is_file() or _is_broken(file)]
    if any(file.suffix == ".arrow" for file in files):
        caches = set[Path]()
        for state in (file for file in files if file.name == SAVED_STATE):
            caches |= _caches(state, files)
        files = [file for file in files if file.name not in DATASET_NOTES and file not in caches]
    found = []
    for file in files:
        parts = file.relative_to(folder).parts
        inside = parts.index("attributes") if "attributes" in parts[:-1] else None
        beside = inside is not None and folder.joinpath(*parts[:inside], "documents").is_dir()
        if not beside and not any(part.startswith(".") for part in parts):
            found.append(file)
    return found


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder; links are followed, without cycles.

    Raises OSError if a folder cannot be read, so that no file is silently missing.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _walk(path, above | {real})
        else:
            yield path


def _caches(state: Path, files: Iterable[Path]) -> set[Path]:
    """Return Arrow files that ``map`` and ``filter`` left beside those of a saved dataset."""
    try:
        listed = {entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]}
    except (ValueError, KeyError, TypeError):
        return set()
    beside = (file for file in files if file.parent == state.parent and file.suffix == ".arrow")
    return {file for file in beside if file.name not in listed}


def _is_broken(file: Path) -> bool:
    """Return whether a file is a dangling link."""
    return file.is_symlink() and not file.exists()


def _unreadable(file: Path) -> str | None:
    """Return why a file cannot be an input, or None."""
    if _is_broken(file):
        return "a dangling link"
    if not is_utf8(str(file)):
        return "its name is not UTF-8; rename it"
    suffix = text_suffix(file)
    own_suffix = file.suffix.lower()
    if suffix in FOREIGN_SUFFIXES or (suffix in TABLE_SUFFIXES and suffix != own_suffix):
        kind = "".join(file.suffixes[-2:]) if suffix != own_suffix else suffix
        return f"{kind} files are not read; convert it to JSONL, one document a line"
    package, extra = PACKAGES.get(own_suffix, (None, None))
    if package is not None and importlib.util.find_spec(package) is None:
        return f"needs the package {package} (pip install 'moetron[{extra}]')"
    return None
