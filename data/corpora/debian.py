"""Multilingual corpus from Debian packages, downloaded and unpacked, never installed."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moetron.common.errors import UserError
from moetron.data.corpora.collect import Task
from moetron.data.corpora.formats import dictd, fortunes, metamath, plain
from moetron.data.corpora.manuals import man, pod
from moetron.data.corpora.web import html

COMMAND_TIMEOUT_S = 900
HELP_LANGUAGES = ("de", "fr", "es", "ru", "ja", "zh-cn", "hi", "ko")
MANUAL_LANGUAGES = ("de", "fr", "es", "ru", "ja", "zh")
REFERENCE_LANGUAGES = ("de", "fr", "ja", "zh-cn")


@dataclass(frozen=True)
class Package:
    """Files to read from one package."""

    name: str
    source: str
    """Class and corpus, as in ``wiki.gcide``."""
    pattern: str
    """Glob of files below the unpacked package."""
    read: Callable[[Path], list[str]]
    exclude: str = r"(?!)"
    """Files to skip: a regular expression searched in the path below the package."""


FORTUNES = "usr/share/games/fortunes/**/*"
INDEXES = r"\.(dat|u8)$"
HELP_PAGES = "usr/share/libreoffice/help/**/text/**/*.html"
SPHINX_PAGES = "usr/share/doc/**/*.html"
SPHINX_LISTS = r"genindex|_modules"
RUST_API = r"/(std|core|alloc|proc_macro|test|src)/"
PACKAGES = (
    Package("anarchism", "prose.anarchism", "usr/share/doc/anarchism/**/*.html", html),
    Package("fortunes", "prose.fortunes", FORTUNES, fortunes, INDEXES),
    Package("debian-reference-en", "prose.debian_reference", "usr/share/**/*.en.html", html),
    Package("libreoffice-help-en-us", "prose.libreoffice", HELP_PAGES, html),
    Package("dict-gcide", "wiki.gcide", "usr/share/dictd/*.dict.dz", dictd),
    Package("dict-wn", "wiki.wordnet", "usr/share/dictd/*.dict.dz", dictd),
    Package("dict-foldoc", "wiki.foldoc", "usr/share/dictd/*.dict.dz", dictd),
    Package("jargon-text", "wiki.jargon", "usr/share/doc/**/jargon.txt.gz", plain),
    Package("cppreference-doc-en-html", "wiki.cppreference", "usr/share/**/*.html", html),
    Package("python3.11-doc", "tech.python", "usr/share/doc/**/_sources/**/*.txt", plain),
    Package("perl-doc", "tech.perl", "usr/share/perl/**/*.pod", pod),
    Package("postgresql-doc-15", "tech.postgresql", "usr/share/doc/**/*.html", html),
    Package("manpages", "tech.manuals", "usr/share/man/man*/*.gz", man),
    Package("manpages-dev", "tech.manuals", "usr/share/man/man*/*.gz", man),
    Package(
        "rust-doc",
        "tech.rust",
        "usr/share/doc/**/*.html",
        html,
        r"/(std|core|alloc|proc_macro|test|src)/",
    ),
    Package("metamath-databases", "math.metamath", "usr/share/**/set.mm", metamath),
    Package("maxima-doc", "math.maxima", "usr/share/**/*.html", html),
    Package("python-scipy-doc", "math.scipy", SPHINX_PAGES, html, SPHINX_LISTS),
    Package("python-sympy-doc", "math.sympy", SPHINX_PAGES, html, SPHINX_LISTS),
    Package("hol-light", "code.hol_light", "usr/share/hol-light/**/*.[mh]l", plain),
    Package("hol-light", "math.hol_light", "usr/share/**/*.doc", plain),
    Package("fortunes-de", "languages.de", FORTUNES, fortunes, INDEXES),
    Package("fortunes-ru", "languages.ru", FORTUNES, fortunes, INDEXES),
    Package("fortunes-zh", "languages.zh", FORTUNES, fortunes, INDEXES),
    *(
        Package(f"libreoffice-help-{tag}", f"languages.{tag[:2]}", HELP_PAGES, html)
        for tag in HELP_LANGUAGES
    ),
    *(
        Package(f"manpages-{tag}", f"languages.{tag}", "usr/share/man/*/man*/*.gz", man)
        for tag in MANUAL_LANGUAGES
    ),
    *(
        Package(
            f"debian-reference-{tag}", f"languages.{tag[:2]}", f"usr/share/**/*.{tag}.html", html
        )
        for tag in REFERENCE_LANGUAGES
    ),
)


def _run(command: list[str], folder: Path) -> str:
    """Return a command's output; raise UserError if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=True,
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; this corpus needs a Debian system") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} took more than {COMMAND_TIMEOUT_S} s; try again") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"{' '.join(command[:6])} ... failed: {lines[0]}") from None
    return done.stdout


def _download(names: list[str], folder: Path, log: Callable[[str], None]) -> list[str]:
    """Download packages with private package lists, so that the system is not changed.

    Returns:
        The names that this release of Debian has.
    """
    lists, cache = folder / "apt" / "lists", folder / "apt" / "cache"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::Lists={lists.resolve()}", "-o", f"Dir::Cache={cache.resolve()}"]
    options += ["-o", "APT::Sandbox::User="]
    _run(["apt-get", *options, "update"], folder)
    known = set(_run(["apt-cache", *options, "pkgnames"], folder).split())
    if unknown := sorted(set(names) - known):
        log(f"not in this release of Debian, skipped: {', '.join(unknown)}")
    found = sorted(set(names) & known)
    _run(["apt-get", *options, "download", *found], folder)
    return found


def _unpack(names: list[str], folder: Path, log: Callable[[str], None]) -> None:
    """Download and unpack the packages missing from ``folder``."""
    missing = sorted(name for name in names if not (folder / name).is_dir())
    if not missing:
        return
    log(f"downloading {len(missing)} Debian packages ...")
    folder.mkdir(parents=True, exist_ok=True)
    for name in _download(missing, folder, log):
        (archive,) = folder.glob(f"{name}_*.deb")
        partial = folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _run(["dpkg-deb", "-x", str(archive.resolve()), str(partial.resolve())], folder)
        partial.rename(folder / name)
        archive.unlink()


def _tasks(package: Package, folder: Path) -> list[Task]:
    """Return the tasks of an unpacked package's files."""
    root = folder / package.name
    return [
        Task(package.source, f"{package.name}/{name}", path, package.read)
        for path in sorted(root.glob(package.pattern))
        for name in [path.relative_to(root).as_posix()]
        if path.is_file() and not path.is_symlink() and not re.search(package.exclude, name)
    ]


def _licence(package: Package, folder: Path) -> str:
    """Return the licences in the package's copyright file."""
    path = folder / package.name / "usr" / "share" / "doc" / package.name / "copyright"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    named = sorted(set(re.findall(r"^License: *(\S.*)$", text, re.M)))
    return f"{package.name}: {', '.join(named) or 'see its copyright file'}"


def gather(folder: Path, log: Callable[[str], None]) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks of all packages, unpacked below ``folder``, and the licence of each source.

    Raises:
        UserError: apt-get or dpkg-deb is missing or fails.
    """
    _unpack([package.name for package in PACKAGES], folder, log)
    tasks = [task for package in PACKAGES for task in _tasks(package, folder)]
    licences: dict[str, list[str]] = {}
    for package in PACKAGES:
        if (folder / package.name).is_dir():
            licences.setdefault(package.source, []).append(_licence(package, folder))
    return tasks, {source: "; ".join(stated) for source, stated in licences.items()}
