"""The rules of CONTRIBUTING.md and docs/architecture.md that a program can check."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import rooms

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("moe", "data", "tokenizers")
PYTHON_ROOTS = (*FOLDERS, "moetron", "tools", "tests", "examples", "docs")
MODULE_LINES, TOOL_LINES, ENTRY_LINES, ROOM_FILES = 400, 120, 150, 15

FLOORS = (
    {"moetron/common", "moe/kernels", "moe/megatron"},
    {"moetron/common/watch", "tokenizers", "data/shards", "data/addressing"},
    {"data/readers", "data/objectives"},
    {"data/encoding", "data/corpora", "data/stream"},
    {"data/prepare", "data/inspect", "data/chat"},
    {"moe/config/schema"},
    {"moe/config/rules"},
    {"moe/config"},
    {"moe/plan", "moe/host", "moe/numerics", "moe/optim"},
    {"moe/routing", "moe/overlap"},
    {"moe/layers"},
    {"moe/encoder_decoder"},
    {"moe/checkpoint/states", "moe/checkpoint/writer"},
    {"moe/checkpoint", "moe/health"},
    {"moe/monitoring"},
    {"moe/training"},
    {"moe/inference", "moe/verify", "moe/convert/families"},
    {"moe/convert", "moe/analysis"},
    {"moe/analysis/ablation", "moe/analysis/page"},
)
"""Rooms, from the ground up: a room imports rooms of lower floors alone."""
MAY_IMPORT = {
    "moetron": {"moetron"},
    "tokenizers": {"tokenizers", "moetron"},
    "data": {"data", "tokenizers", "moetron"},
    "moe": {"moe", "moetron"},
}
"""Of the trees: `moe` sees samples through a protocol, never through `data`."""
OWN = ("moetron.common", "moetron.common.watch", "moetron.commands")
"""Packages without a folder of their own at the top."""
SETTINGS = ("moe.config.schema", "moe.config.rules")
"""Settings and the rules about them are named alike."""


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_files_of_tests_have_names_of_their_own() -> None:
    names = [path.name for path in modules("tests") if path.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1}, "pytest imports by name"


def floor(room: str) -> int:
    return next(number for number, row in enumerate(FLOORS) if room in row)


def test_every_room_has_a_floor() -> None:
    graph = rooms.arrows(ROOT)
    with_modules = {
        rooms.room_of(path, ROOT)
        for path in rooms.modules(ROOT).values()
        if path.name != "__init__.py"
    }
    assert with_modules == set().union(*FLOORS)
    assert graph["moe"] == {"moe/host"}  # which guards every later import of megatron-core
    assert not graph["data"]


def test_imports_point_to_lower_floors() -> None:
    wrong = [
        f"{room} imports {other}"
        for room, others in rooms.arrows(ROOT).items()
        if room != "moe"  # its __init__.py
        for other in others
        if floor(other) >= floor(room) or other.split("/")[0] not in MAY_IMPORT[room.split("/")[0]]
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_are_not_crowded() -> None:
    known = rooms.modules(ROOT).values()
    found = [rooms.room_of(path, ROOT) for path in known if path.name != "__init__.py"]
    crowded = {room: found.count(room) for room in found if found.count(room) > ROOM_FILES}
    assert not crowded


def test_modules_have_names_of_their_own() -> None:
    found: dict[str, list[str]] = {}
    for name, path in rooms.modules(ROOT).items():
        if path.name != "__init__.py":
            found.setdefault(path.stem, []).append(name)
    twins = {
        stem: names
        for stem, names in found.items()
        if len([name for name in names if not name.startswith(SETTINGS)]) > 1
    }
    assert not twins


def test_there_are_no_cycles() -> None:
    """Among our modules, lazily imported ones included."""
    known = rooms.modules(ROOT)
    graph = {name: set(rooms.own_imports(path, known)) - {name} for name, path in known.items()}
    _, circular = rooms.floors(graph)
    assert not circular


def test_bare_names_of_our_folders_are_never_imported() -> None:
    """``tokenizers`` alone is HuggingFace's; ``moe`` and ``data`` would be second copies."""
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*modules(*PYTHON_ROOTS), ROOT / "pretrain_moe.py"]
        for name in rooms.imports(path)
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


VERSIONS = ROOT / "moe" / "megatron"
QUESTIONS = ("hasattr", "getattr", "signature")


def version_checks(program: str) -> list[str]:
    """Return the calls and imports of a module by which it tells versions of megatron-core apart.

    Its attributes, signatures and version number, optional imports, and the version of Python.
    """
    nodes = list(ast.walk(ast.parse(program)))
    theirs = {
        alias.asname or alias.name.split(".")[0]
        for node in nodes
        for alias in getattr(node, "names", [])
        if isinstance(node, ast.Import | ast.ImportFrom)
        and (getattr(node, "module", None) or alias.name).startswith("megatron")
    }

    def is_theirs(node: ast.AST) -> bool:
        names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
        return bool(theirs.intersection(names))

    found = []
    for node in nodes:
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            optional = name != "getattr" or len(node.args) == 3
            if name in QUESTIONS and optional and is_theirs(node.args[0]):
                found.append(ast.unparse(node))
            if name == "version" and "megatron" in ast.unparse(node.args[0]):
                found.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and (
            node.attr == "version_info" or (node.attr == "__version__" and is_theirs(node.value))
        ):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Try):
            found += [
                ast.unparse(line)
                for line in node.body
                if isinstance(line, ast.Import | ast.ImportFrom)
                and "megatron" in ast.unparse(line).split()[1]
            ]
    return found


def test_one_room_knows_versions_of_megatron_core() -> None:
    shown = {"metadata.version('megatron-core')"}  # by moetron --version
    wrong = [
        f"{path.relative_to(ROOT)}: {check}"
        for path in [*modules(*FOLDERS, "moetron", "tools"), ROOT / "pretrain_moe.py"]
        if path.parent != VERSIONS
        for check in version_checks(path.read_text(encoding="utf-8"))
        if check not in shown
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "program",
    [
        "from megatron.core import utils\nhasattr(utils, 'x')",
        "import inspect\nfrom megatron.core import utils\ninspect.signature(utils.f).parameters",
        "import megatron.core\nmegatron.core.__version__ > '0.17'",
        "import importlib.metadata\nimportlib.metadata.version('megatron-core')",
        "import sys\nif sys.version_info > (3, 12): pass",
        "try:\n    from megatron.core import new\nexcept ImportError:\n    new = None",
    ],
)
def test_version_checks_are_found(program: str) -> None:
    assert version_checks(program)


def test_no_type_checking_excuses() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in modules(*FOLDERS)
        for name in rooms.imports(path)
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
    own = {
        name: name.replace(".", "/")
        for name in ("moetron.common", "moetron.common.watch", "moetron.commands")
    }
    assert listed == {"moetron": "moetron", **own, "moetron.recipes": "examples", **expected}
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
