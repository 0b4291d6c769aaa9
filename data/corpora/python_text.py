"""Split Python files into code and documentation, so that no text counts twice."""

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path

from moetron.data.corpora.collect import Task
from moetron.data.corpora.formats import read_text, tidy

DOCUMENTATION_CHARACTERS = 80
"""Longer docstrings are documents of their own."""
EXCLUDED_FOLDERS = frozenset({
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data",
    "encodings", "__pycache__",
})  # fmt: skip
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(body: Sequence[ast.stmt]) -> Iterator[Documented]:
    """Yield classes and functions of a body, nested ones too; expressions are not walked (slow)."""
    for node in body:
        if isinstance(node, Documented):
            yield node
        for field in ("body", "orelse", "handlers", "finalbody"):
            yield from _definitions(getattr(node, field, ()))


def _documentation(tree: ast.Module) -> Iterator[tuple[Documented, ast.Expr, str]]:
    """Yield (documented node, its statement, its text) of every long docstring."""
    for node in (tree, *_definitions(tree.body)):
        text = ast.get_docstring(node)
        if text is not None and len(text) > DOCUMENTATION_CHARACTERS:
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            yield node, statement, text


def code(path: Path) -> list[str]:
    """Read a file without its long docstrings; it still parses."""
    source = read_text(path)
    lines = source.split("\n")
    for node, statement, _ in _documentation(ast.parse(source)):
        assert statement.end_lineno is not None
        first, last = statement.lineno - 1, statement.end_lineno - 1
        alone_on_its_lines = not lines[first][: statement.col_offset].strip()
        if not alone_on_its_lines or lines[last].encode()[statement.end_col_offset or 0 :].strip():
            continue
        only = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first] = " " * statement.col_offset + "pass" if only else "\0"
        lines[first + 1 : last + 1] = ["\0"] * (last - first)
    return [tidy("\n".join(line for line in lines if line != "\0"))]


def documentation(path: Path) -> list[str]:
    """Read a file's long docstrings in order, each under the name it documents."""
    return [
        tidy(text if isinstance(node, ast.Module) else f"{node.name}\n\n{text}")
        for node, _, text in _documentation(ast.parse(read_text(path)))
    ]


def topics(path: Path) -> list[str]:
    """Read the language reference's topics for ``help()``: the dictionary in topics.py."""
    for node in ast.parse(read_text(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return [tidy(text) for text in ast.literal_eval(node.value).values()]
    return []


def standard_library_files() -> tuple[Path, list[Path]]:
    """Return the folder of the standard library and its files, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    return root, [f for f in files if EXCLUDED_FOLDERS.isdisjoint(f.relative_to(root).parts)]


def standard_library() -> list[Task]:
    """Return tasks for code, docstrings and topics of the standard library, without tests."""
    root, files = standard_library_files()
    tasks = [
        task
        for path in files
        for name in [f"python/{path.relative_to(root).as_posix()}"]
        for task in (
            Task("code.python", name, path, code),
            Task("documentation.python", name, path, documentation),
        )
    ]
    topics_path = root / "pydoc_data" / "topics.py"
    if topics_path.is_file():
        tasks.append(Task("documentation.python", "python/topics", topics_path, topics))
    return tasks


def installed_packages() -> list[Task]:
    """Return tasks for the docstrings of installed packages, without tests."""
    roots = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
    return [
        Task("documentation.packages", path.relative_to(root).as_posix(), path, documentation)
        for root in sorted(roots)
        for path in sorted(root.rglob("*.py"))
        if {"test", "tests", "testing"}.isdisjoint(path.relative_to(root).parts)
    ]


def licences() -> dict[str, str]:
    """Return the licence of each Python source, as far as the packages state it."""
    stated = sorted(
        f"{found.metadata['Name']}: {found.metadata['License-Expression']}"
        for found in distributions()
        if found.metadata["License-Expression"]
    )
    return {
        "code.python": "PSF-2.0",
        "documentation.python": "PSF-2.0",
        "documentation.packages": "each package's own; stated: " + ", ".join(stated),
    }
