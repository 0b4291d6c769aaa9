"""Demonstration chats from documentation strings and manual pages."""

from pathlib import Path

from moetron.data.corpora.questions import (
    Entry,
    chats,
    distinct,
    manual_entries,
    pairs,
    python_entries,
)

SOURCE = '''
def opened(x):
    """Return the file that is opened by x. Further text."""

class _Hidden:
    """Not shown to anyone at all here."""

class Shown:
    """A class which has a summary over
    two lines."""

def short():
    """Quite tooooooooooo short."""

def again():
    """Return the file that is opened by x."""
'''
PAGE = ".TH {0} 1\n.SH NAME\n{0} \\- {1}\n.SH SYNOPSIS\n.B {0}\n"
FOUND = [
    Entry("opened", "Return the file that is opened by x.", "the module pkg"),
    Entry("Shown", "A class which has a summary over two lines.", "the module pkg"),
    Entry("ls", "List directory contents of folders.", "the manual of ls"),
]


def test_entries(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (")
    files = [tmp_path / "broken.py", tmp_path / "pkg" / "__init__.py"]
    found = list(distinct(python_entries(files, tmp_path)))
    assert found == FOUND[:2]
    assert list(manual_entries(tmp_path)) == []
    pages = tmp_path / "man" / "man1"
    pages.mkdir(parents=True)
    (pages / "ls.1").write_text(PAGE.format("ls", "list directory contents\nof folders"))
    (pages / "two.1").write_text(PAGE.format("one, two", "describe two commands together"))
    (pages / "dir.1").symlink_to(pages / "ls.1")
    (pages / "empty.1").write_text("")
    assert list(manual_entries(tmp_path)) == FOUND[2:]


def test_rows() -> None:
    first, second, _ = ([m["content"] for m in row["messages"]] for row in chats(FOUND))
    assert first == [
        "What does opened do?",
        "Return the file that is opened by x.",
        "Where is it documented?",
        "See the module pkg.",
    ]
    assert second == ["Explain Shown.", FOUND[1].sentence]
    first, third = pairs(FOUND)
    assert first["prompt"] == "What does opened do?"
    assert third == {
        "prompt": "What is ls for?",
        "chosen": "List directory contents of folders. See the manual of ls.",
        "rejected": "List directory contents of folders.",
    }
