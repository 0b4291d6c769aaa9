"""Demonstration chats from documentation strings."""

from pathlib import Path

from moetron.data.corpora.questions import chats, pairs, summaries

SOURCE = '''
def opened(x):
    """Return the file that is opened by x. Further text."""

class _Hidden:
    """Not shown to anyone at all here."""

class Shown:
    """A class which has a summary over
    two lines."""

def short():
    """Too short."""
'''


def test_questions(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (")
    files = [tmp_path / "broken.py", tmp_path / "pkg" / "__init__.py"]
    found = list(summaries(files, tmp_path))
    assert found == [
        ("pkg", "opened", "Return the file that is opened by x."),
        ("pkg", "Shown", "A class which has a summary over two lines."),
    ]
    first, second = ([m["content"] for m in row["messages"]] for row in chats(found))
    assert first == [
        "What does opened do?",
        "Return the file that is opened by x.",
        "Which module is it in?",
        "It is in pkg.",
    ]
    assert second == ["Explain Shown.", found[1][2]]
    row = next(pairs(found))
    assert row["chosen"] == found[0][2]
    assert row["rejected"] == "by file is opened Return that the x."
