"""Questions and answers from the documentation strings of Python's standard library.

A demonstration of fine-tuning, not data to make a useful model of. A chat asks what a function
does; the answer is the first sentence of its documentation. Every third has a second question, for
its module. A preference is that sentence over the same words in alphabetical order: a rule that a
tiny model can learn, and that says nothing about helpfulness.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moetron.data.corpora.formats import read_text
from moetron.data.corpora.python_text import standard_library_files

_SENTENCE = re.compile(r"^[A-Z].{15,200}?[.!](?=\s|$)", re.DOTALL)
_ASKED = ("What does {} do?", "Explain {}.", "What is {} for?")


def summaries(files: Sequence[Path], root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (module, name, first sentence) of documented functions and classes, each once."""
    seen: set[str] = set()
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
            if found is None:
                continue
            sentence = " ".join(found[0].split())
            if sentence not in seen and len(sentence.split()) > 3:
                seen.add(sentence)
                yield module, node.name, sentence


def chats(found: Sequence[tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
    """Yield rows with ``messages``."""
    for number, (module, name, sentence) in enumerate(found):
        question = _ASKED[number % len(_ASKED)].format(name)
        turns = [(question, sentence)]
        if number % 3 == 0:
            turns.append(("Which module is it in?", f"It is in {module}."))
        yield {"messages": [message for turn in turns for message in _turn(*turn)]}


def pairs(found: Sequence[tuple[str, str, str]]) -> Iterator[dict[str, str]]:
    """Yield rows with ``prompt``, ``chosen`` and ``rejected``."""
    for number, (_, name, sentence) in enumerate(found):
        words = sentence.split()
        yield {
            "prompt": _ASKED[number % len(_ASKED)].format(name),
            "chosen": sentence,
            "rejected": " ".join(sorted(words, key=str.lower)),
        }


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def collected() -> list[tuple[str, str, str]]:
    """Return the summaries of this Python's standard library, in the order of its files."""
    root, files = standard_library_files()
    return list(summaries(files, root))
