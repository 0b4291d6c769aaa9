"""Rooms of the code: folders, their sizes, which imports which, and cycles among them.

    python -m tests.rooms [CHECKOUT]

tests/unit/test_structure.py holds the rules; this prints what is there, for any checkout.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREES = ("moetron/common", "tokenizers", "data", "moe")
Arrows = dict[str, set[str]]
"""Room -> the other rooms that its modules import."""


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below ``moetron`` -> file, of every module of the four trees."""
    found = {}
    for tree in TREES:
        for path in sorted((root / tree).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts).removeprefix("moetron.")] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own_imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Those of ``known`` that a file imports."""
    for name in imports(path):
        own = name.removeprefix("moetron.")
        if own != name:
            yield from [n for n in (own, own.rpartition(".")[0]) if n in known][:1]


def room_of(path: Path, root: Path) -> str:
    """The folder of a module, from the checkout's root."""
    return path.parent.relative_to(root).as_posix()


def arrows(root: Path) -> Arrows:
    """What each room imports of the others."""
    known = modules(root)
    found: Arrows = {room_of(path, root): set() for path in known.values()}
    for path in known.values():
        room = room_of(path, root)
        found[room] |= {room_of(known[name], root) for name in own_imports(path, known)} - {room}
    return found


def floors(graph: Arrows) -> tuple[list[list[str]], list[str]]:
    """Rooms by floor, each importing lower ones alone, and those in or above a cycle."""
    placed: set[str] = set()
    rows = []
    while row := sorted(room for room in graph if room not in placed and graph[room] <= placed):
        rows.append(row)
        placed.update(row)
    return rows, sorted(set(graph) - placed)


def main(root: Path) -> None:
    """Print sizes, arrows, floors and cycles."""
    graph, known = arrows(root), modules(root)
    for room, imported in graph.items():
        files = [p for p in known.values() if room_of(p, root) == room and p.name != "__init__.py"]
        print(f"{room:24} {len(files):3} files -> {', '.join(sorted(imported)) or 'nothing'}")
    rows, circular = floors(graph)
    for number, row in enumerate(rows):
        print(f"floor {number}: {', '.join(row)}")
    print(f"{len(graph)} rooms, {sum(map(len, graph.values()))} arrows, {len(rows)} floors")
    print(f"in or above a cycle: {', '.join(circular) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT)
