"""Documentation files of a system, below its documentation and manual folders."""

import re
from pathlib import Path

from moetron.data.corpora.collect import Task
from moetron.data.corpora.formats import info, plain
from moetron.data.corpora.manuals import man, pod
from moetron.data.corpora.web import html

SHARE = Path("/usr/share")
READERS = {
    ".html": html, ".htm": html, ".txt": plain, ".md": plain, ".rst": plain, ".text": plain,
    ".org": plain, ".pod": pod, ".info": info,
}  # fmt: skip
LEGAL_OR_HISTORY = re.compile(r"changelog|copyright|licen[cs]e|copying|news|changes|history", re.I)
WITHOUT_SUFFIX = re.compile(r"readme|faq|todo|howto|manual|guide|notes|introduction|overview", re.I)
LICENCE = "each file's own: see the copyright file of its package below the documentation folder"


def _files(root: Path, pattern: str = "*") -> list[Path]:
    """Return the regular files below a folder, sorted; none if there is no such folder."""
    return sorted(path for path in root.rglob(pattern) if path.is_file() and not path.is_symlink())


def _document(path: Path, share: Path) -> Task | None:
    """Return the task of a file below the documentation folder, or None for a file to skip."""
    name = path.name.removesuffix(".gz").lower()
    if LEGAL_OR_HISTORY.search(name):
        return None
    reader = READERS.get(Path(name).suffix)
    if reader is None and WITHOUT_SUFFIX.match(name):
        reader = plain
    if reader is None:
        return None
    return Task("documentation.system", path.relative_to(share).as_posix(), path, reader)


def documentation(share: Path = SHARE) -> list[Task]:
    """Return tasks for text, HTML, pod and info files."""
    tasks = [_document(path, share) for path in _files(share / "doc")]
    perl = [*_files(share / "perl", "*.pod"), *_files(share / "perl5", "*.pod")]
    tasks += [
        Task("documentation.system", path.relative_to(share).as_posix(), path, reader)
        for paths, reader in ((perl, pod), (_files(share / "info", "*.info*.gz"), info))
        for path in paths
    ]
    return [task for task in tasks if task is not None]


def manuals(share: Path = SHARE) -> list[Task]:
    """Return tasks for manual pages: English ones and translated ones, each a source."""
    root = share / "man"
    return [
        Task(
            "manuals.english" if path.parent.parent == root else "manuals.translated",
            path.relative_to(share).as_posix(),
            path,
            man,
        )
        for path in _files(root)
        if path.parent.name.startswith("man")
    ]


def licences() -> dict[str, str]:
    """Return the licence of each source."""
    sources = ("documentation.system", "manuals.english", "manuals.translated")
    return dict.fromkeys(sources, LICENCE)
