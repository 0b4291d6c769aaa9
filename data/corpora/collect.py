"""Write files on disk to a corpus: one JSONL file a source, and a hidden manifest.

The output is a function of the files and the budget: tasks are ordered by a hash, so that a source
truncated at its budget is a fair sample of it; equal texts are kept once, by the first source.
"""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from moetron.common.files import atomic_file, sha256_of
from moetron.tokenizers.training_sample import blocks, unimax

DOCUMENT_CHARACTERS = 200_000
"""Longer documents are split into documents of complete lines."""
SHORTEST_CHARACTERS = 80
MANIFEST = ".manifest.json"
"""Hidden, so that the corpus folder can be an input."""
GZIP_RATIO = 3
BATCH_TASKS = 64


@dataclass(frozen=True)
class Task:
    """File that contains documents."""

    source: str
    """Class of its documents."""
    id: str
    """Name of the file, the same on every machine."""
    path: Path
    read: Callable[[Path], list[str]]
    """Reader of ``moetron.data.corpora``: returns the file's documents."""


@dataclass
class SourceCount:
    """Counts of one source."""

    documents: int = 0
    bytes: int = 0
    duplicates: int = 0
    sha256: str = ""


def documents_of(task: Task) -> list[str]:
    """Return the task's documents, long ones split; a file that cannot be read has none."""
    try:
        texts = task.read(task.path)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    return [part for text in texts for part in blocks(text, DOCUMENT_CHARACTERS)]


def expected_bytes(tasks: Sequence[Task], budget_bytes: int) -> dict[str, int]:
    """Estimate the text bytes of each source: UniMax over the sizes on disk."""
    sizes: dict[str, int] = {}
    for task in tasks:
        packed = task.path.suffix in (".gz", ".dz")
        size = task.path.stat().st_size * (GZIP_RATIO if packed else 1)
        sizes[task.source] = sizes.get(task.source, 0) + size
    return {source: round(taken) for source, taken in unimax(sizes, budget_bytes, 1).items()}


def _by_hash(tasks: Sequence[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: hashlib.blake2b(task.id.encode()).digest())


def _write_source(
    path: Path, tasks: Sequence[Task], budget_bytes: int, seen: set[bytes], pool: Any
) -> SourceCount:
    """Write the documents of one source until its budget is used."""
    count = SourceCount()
    digest = hashlib.sha256()
    rest = iter(_by_hash(tasks))
    with atomic_file(path) as file:
        while count.bytes < budget_bytes and (batch := list(islice(rest, BATCH_TASKS))):
            for task, texts in zip(batch, pool.map(documents_of, batch, 4), strict=True):
                for row in _rows(task, texts, seen, count, budget_bytes):
                    file.write(row)
                    digest.update(row)
    count.sha256 = digest.hexdigest()
    return count


def _rows(
    task: Task, texts: Sequence[str], seen: set[bytes], count: SourceCount, budget_bytes: int
) -> Iterator[bytes]:
    """Yield JSONL rows of a task's new documents within the budget, and count them."""
    for number, text in enumerate(texts):
        if len(text) < SHORTEST_CHARACTERS:
            continue
        content = text.encode(errors="replace")
        key = hashlib.blake2b(content, digest_size=16).digest()
        if key in seen:
            count.duplicates += 1
            continue
        seen.add(key)
        if count.bytes + len(content) > budget_bytes:
            continue
        count.bytes += len(content)
        count.documents += 1
        row = {"text": content.decode(), "source": task.source, "id": f"{task.id}#{number}"}
        yield orjson.dumps(row) + b"\n"


def write_corpus(
    tasks: Sequence[Task],
    output: Path,
    budget_bytes: int,
    workers: int,
    report: Callable[[str, SourceCount], None],
) -> dict[str, SourceCount]:
    """Write ``OUTPUT/SOURCE.jsonl`` for every source with text; call ``report`` for each.

    Unused budget of a source passes to the later ones.
    """
    output.mkdir(parents=True, exist_ok=True)
    by_source: dict[str, list[Task]] = {}
    for task in tasks:
        by_source.setdefault(task.source, []).append(task)
    expected = expected_bytes(tasks, budget_bytes)
    left = budget_bytes
    seen: set[bytes] = set()
    counts: dict[str, SourceCount] = {}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for source in by_source:
            path = output / f"{source}.jsonl"
            allowed = left * expected[source] // max(1, sum(expected.values()))
            count = _write_source(path, by_source[source], allowed, seen, pool)
            left -= count.bytes
            del expected[source]
            if count.documents == 0:
                path.unlink()
                continue
            counts[source] = count
            report(source, count)
    return counts


def write_manifest(
    output: Path,
    made_from: Mapping[str, Any],
    counts: Mapping[str, SourceCount],
    licences: Mapping[str, str],
) -> None:
    """Write the manifest, last: it marks the corpus as complete."""
    sources = {
        source: {**asdict(count), "licence": licences.get(source, "unknown")}
        for source, count in counts.items()
    }
    manifest = {"made_from": made_from, "sources": sources}
    with atomic_file(output / MANIFEST) as file:
        file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))


def is_current(output: Path, made_from: Mapping[str, Any]) -> bool:
    """Return whether the folder contains the complete corpus of these settings."""
    path = output / MANIFEST
    if not path.is_file():
        return False
    try:
        manifest = orjson.loads(path.read_bytes())
        complete = all(
            (file := output / f"{source}.jsonl").is_file() and sha256_of(file) == recorded["sha256"]
            for source, recorded in manifest["sources"].items()
        )
        return complete and bool(manifest["made_from"] == dict(made_from))
    except (ValueError, KeyError, TypeError, AttributeError):  # not a manifest of ours
        return False
