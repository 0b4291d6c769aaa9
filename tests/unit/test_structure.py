"""The rules of CONTRIBUTING.md and docs/architecture.md that a program can check."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("moe", "data", "tokenizers")
PYTHON_ROOTS = (*FOLDERS, "moetron", "tools", "tests", "examples")
MODULE_LINES, TOOL_LINES, ENTRY_LINES = 400, 120, 150

MAY_IMPORT = {
    "tokenizers": {"tokenizers"},
    "data": {"data", "tokenizers"},
    "moe": {"moe"},
}
"""Of our top-level folders."""
LAYERS = (
    {"config"},
    {"plan"},
    {"host"},
    {"layers", "routing"},
    {"training"},
    {"convert", "analysis"},
)
"""Folders of moe/, from left to right: left never imports right."""


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own_imports(path: Path) -> Iterator[list[str]]:
    """What a file imports of ours, without ``moetron``: ``["moe", "config", "settings", ...]``."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "moetron":
            yield parts[1:]


def test_files_of_tests_have_names_of_their_own() -> None:
    names = [path.name for path in modules("tests") if path.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1}, "pytest imports by name"


def layer(folder: str) -> int:
    return next(index for index, folders in enumerate(LAYERS) if folder in folders)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports moetron.{'.'.join(parts)}"
        for path in modules(folder)
        for parts in own_imports(path)
        if parts[0] in FOLDERS and parts[0] not in MAY_IMPORT[folder]
    ]
    assert not wrong, "\n".join(wrong)


def test_layers_of_the_model_point_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports moetron.{'.'.join(parts)}"
        for path in modules("moe")
        for parts in own_imports(path)
        if len(parts) > 1 and parts[0] == "moe" and path.parent != ROOT / "moe"
        if layer(parts[1]) > layer(path.relative_to(ROOT / "moe").parts[0])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_the_model_has_a_layer() -> None:
    found = {path.parent.name for path in (ROOT / "moe").glob("*/*.py")}
    assert found <= set().union(*LAYERS)


def test_there_are_no_cycles() -> None:
    """Among our modules, lazily imported ones included."""
    names = {module_name(path): path for path in modules(*FOLDERS)}
    graph = {
        name: {found for parts in own_imports(path) if (found := resolve(parts, names))} - {name}
        for name, path in names.items()
    }
    done: set[str] = set()
    while ready := [name for name in graph if name not in done and graph[name] <= done]:
        done.update(ready)
    assert done == set(graph), f"in or behind a cycle: {sorted(set(graph) - done)}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def resolve(parts: list[str], names: dict[str, Path]) -> str | None:
    """The module that holds an imported name."""
    return next((n for n in (".".join(parts), ".".join(parts[:-1])) if n in names), None)


def test_bare_names_of_our_folders_are_never_imported() -> None:
    """``tokenizers`` alone is HuggingFace's; ``moe`` and ``data`` would be second copies."""
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*modules(*PYTHON_ROOTS), ROOT / "pretrain_moe.py"]
        for name in imports(path)
        if name.split(".")[0] in ("moe", "data")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["tokenizers", "megatron"])
def test_foreign_packages_are_not_shadowed(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("path_entry", ["", str(ROOT)])
def test_huggingface_tokenizers_import_from_the_checkout(path_entry: str) -> None:
    """As under ``python pretrain_moe.py`` and torchrun: the checkout comes first on sys.path."""
    program = (
        f"import sys; sys.path.insert(0, {path_entry!r}); import tokenizers; "
        "import moetron.tokenizers.huggingface as ours; "
        "print(tokenizers.Tokenizer.__module__, ours.tokenizers is tokenizers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["tokenizers", "True"]


def test_no_type_checking_excuses() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in modules(*FOLDERS)
        for name in imports(path)
        if name == "typing.TYPE_CHECKING"
    ]
    assert not wrong


def test_setup_lists_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each folder with modules, and only packages with an __init__ but for tokenizers/."""
    import setuptools

    listed: dict[str, str] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **words: listed.update(words["package_dir"]))
    setup_file = ROOT / "setup.py"
    program = compile(setup_file.read_text(encoding="utf-8"), setup_file, "exec")
    exec(program, {"__file__": setup_file})
    folders = {path.parent.relative_to(ROOT).as_posix() for path in modules(*FOLDERS)}
    expected = {f"moetron.{folder.replace('/', '.')}": folder for folder in folders}
    assert listed == {"moetron": "moetron", **expected}
    without_init = {folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()}
    assert without_init == {"tokenizers"}


def test_files_stay_short() -> None:
    limits = {
        **dict.fromkeys(modules(*PYTHON_ROOTS), MODULE_LINES),
        **dict.fromkeys(modules("tools"), TOOL_LINES),
        ROOT / "pretrain_moe.py": ENTRY_LINES,
    }
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in limits}
    long = [
        f"{path.relative_to(ROOT)}: {count} lines, at most {limits[path]}"
        for path, count in counts.items()
        if count > limits[path]
    ]
    assert not long, "\n".join(long)
