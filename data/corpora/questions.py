"""Questions and answers from documentation on this machine.

A demonstration of fine-tuning, not data to make a useful model of. A chat asks what a function of
Python's standard library or a command does; the answer is the first sentence of its documentation,
or the line of its manual page. Every third chat has a second question, for the place. A preference
is the answer that also names the place, over the one that does not: a rule that a tiny model can
learn and that its own answers then show.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetron.data.corpora.formats import read_text
from moetron.data.corpora.manuals import man
from moetron.data.corpora.python_text import standard_library_files
from moetron.data.corpora.system_text import SHARE

_SENTENCE = re.compile(r"^[A-Z].{15,200}?[.!](?=\s|$)", re.DOTALL)
_MANUAL = re.compile(r"^NAME\n+(\S+) +(?:\\-|[-\u2013\u2014])+ +(\S.{15,160}?)\n\n", re.M | re.S)
"""Name and description of a page of one command; pages of several have commas or spaces."""
_SECTIONS = ("man1", "man8")
"""Commands, and those of administrators."""
_FEWEST_WORDS = 4
_ASKED = ("What does {} do?", "Explain {}.", "What is {} for?")


@dataclass(frozen=True)
class Entry:
    """A documented function, class or command."""

    name: str
    sentence: str
    place: str
    """Where its documentation is."""


def python_entries(files: Sequence[Path], root: Path) -> Iterator[Entry]:
    """Yield documented functions and classes of Python files, by the first sentence."""
    for file in files:
        module = ".".join(file.relative_to(root).with_suffix("").parts)
        module = module.removesuffix(".__init__")
        try:
            body = ast.parse(read_text(file)).body
        except (SyntaxError, ValueError):
            continue
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            found = _SENTENCE.match((ast.get_docstring(node) or "").strip())
            if found is not None:
                yield Entry(node.name, " ".join(found[0].split()), f"the module {module}")


def manual_entries(share: Path) -> Iterator[Entry]:
    """Yield commands with a manual page, by its line of description; none without pages."""
    for folder in _SECTIONS:
        for path in sorted((share / "man" / folder).glob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            try:
                texts = man(path)
            except (OSError, ValueError, EOFError):
                continue
            found = _MANUAL.search(f"{texts[0]}\n\n") if texts else None
            if found is not None:
                words = " ".join(found[2].split())
                sentence = words[0].upper() + words[1:].removesuffix(".") + "."
                yield Entry(found[1], sentence, f"the manual of {found[1]}")


def distinct(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Yield the entries of some words whose sentence is new."""
    seen: set[str] = set()
    for entry in entries:
        if entry.sentence not in seen and len(entry.sentence.split()) >= _FEWEST_WORDS:
            seen.add(entry.sentence)
            yield entry


def chats(found: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """Yield rows with ``messages``."""
    for number, entry in enumerate(found):
        turns = [(_question(number, entry), entry.sentence)]
        if number % 3 == 0:
            turns.append(("Where is it documented?", f"See {entry.place}."))
        yield {"messages": [message for turn in turns for message in _turn(*turn)]}


def pairs(found: Sequence[Entry]) -> Iterator[dict[str, str]]:
    """Yield rows with ``prompt``, ``chosen`` and ``rejected``, for every second entry."""
    for number, entry in list(enumerate(found))[::2]:
        yield {
            "prompt": _question(number, entry),
            "chosen": f"{entry.sentence} See {entry.place}.",
            "rejected": entry.sentence,
        }


def _question(number: int, entry: Entry) -> str:
    return _ASKED[number % len(_ASKED)].format(entry.name)


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def collected() -> list[Entry]:
    """Return the entries of this Python's standard library and of this machine's manual pages."""
    root, files = standard_library_files()
    return list(
        distinct(e for s in (python_entries(files, root), manual_entries(SHARE)) for e in s)
    )
