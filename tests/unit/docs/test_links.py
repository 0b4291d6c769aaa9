"""Relative links and pictures of every Markdown page lead to a file, and to a heading of it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_TOP = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
_FORBIDDEN = {"tokenizers/__init__.py", "megatron/__init__.py"}
_FOREIGN = {"pretrain_gpt.py", "common/recipe/__init__.py", "tests/pytorch/references/"}
"""Files of Megatron-LM and Transformer Engine."""
_NAMES = {path.name for folder in _TOP for path in (ROOT / folder).glob("**/*.[ps][yh]")}
_CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links and pictures, outside code."""
    return _LINK.findall(_CODE.sub("", text))


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links(path: Path) -> None:
    broken = []
    for target in links(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue  # leaves the repository: bash tools/build_docs.sh --links
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_there_are_links() -> None:
    assert sum(len(links(path.read_text(encoding="utf-8"))) for path in PAGES) > 80


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# A b\n[x](b.md) `[y](c.md)` [z](#a-b) [w](#c)\n", encoding="utf-8")
    assert links(page.read_text(encoding="utf-8")) == ["b.md", "#a-b", "#c"]
    assert anchors(page) == {"a-b"}


def test_every_page_is_in_a_table_of_contents() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for path in PAGES:
        if path.is_relative_to(ROOT / "docs") and path.name != "index.md":
            name = path.relative_to(ROOT / "docs").with_suffix("").as_posix()
            assert re.search(rf"(^|<){re.escape(name)}>?$", index, flags=re.MULTILINE), name


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if path.name not in ("LOG.md", "CHANGELOG.md")],  # what was once
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_files_that_pages_name_exist(path: Path) -> None:
    """``moe/routing/router.py`` by its path, ``router.py`` by its name, ``data/readers/`` too."""
    named = re.findall(r"`([\w./-]+(?:\.py|\.sh|/))`", path.read_text(encoding="utf-8"))
    ours = [name for name in named if name.split("/")[0] in _TOP or name.endswith((".py", ".sh"))]
    ours = [name for name in ours if name not in _FORBIDDEN | _FOREIGN and "NAME" not in name]
    absent = [name for name in ours if not any(ROOT.glob(name)) and not _known_by_name(name, path)]
    assert not absent


def _known_by_name(name: str, page: Path) -> bool:
    return name in _NAMES or (page.parent / name).exists()
