"""Generated questions for the tasks in this folder; nothing is downloaded."""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset

_PAIRS = {"(": ")", "[": "]", "{": "}"}
_NAMES = ("data", "items", "load", "value", "x", "key", "total", "size")


def brackets(**_: Any) -> dict[str, Dataset]:
    """Return 200 expressions that end where an inner and an outer bracket must close."""
    random_numbers = random.Random(0)
    rows = []
    for _number in range(200):
        outer, inner = random_numbers.sample(sorted(_PAIRS), 2)
        name, first, second = random_numbers.sample(_NAMES, 3)
        closing = _PAIRS[inner], _PAIRS[outer]
        rows.append(
            {
                "text": f"{name} = {outer}{first}, {inner}{second}",
                "right": "".join(closing),
                "wrong": "".join(reversed(closing)),
            }
        )
    return {"test": Dataset.from_list(rows)}


def pages(**_: Any) -> dict[str, Dataset]:
    """Return the pages of ``docs/``."""
    folder = Path(__file__).resolve().parents[2] / "docs"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))]
    return {"test": Dataset.from_list([{"text": text} for text in texts])}


def numbers(**_: Any) -> dict[str, Dataset]:
    """Return 50 rows of consecutive numbers without the last."""
    rows = [
        {"text": ",".join(f" {first + step}" for step in range(4)) + ",", "answer": f" {first + 4}"}
        for first in range(1, 51)
    ]
    return {"test": Dataset.from_list(rows)}
