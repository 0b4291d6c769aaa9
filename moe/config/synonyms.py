"""Hints for unknown names: settings of other programs, and misspellings."""

import re
from collections.abc import Callable, Iterable

from moetron.moe.config.foreign_names import DIFFERENT, PREFIXES, SAME
from moetron.moe.config.schema.field import flag_name, nearest
from moetron.moe.config.schema.settings import fields


def flag_answer(flag: str, valid: Iterable[str]) -> str:
    """Return the hint after ``unknown flag --X``, with a separator, or ""."""
    name = flag.lstrip("-").rpartition(".")[2]  # --model.num-layers
    if name != flag.lstrip("-") and f"--{name}" in (valid := list(valid)):
        return f": use --{name}, without the group"
    return _answer(name, flag_name) or nearest(flag, valid)


def key_answer(key: str, valid: Iterable[str]) -> str:
    """Return the hint after a recipe's unknown key, with a separator, or ""."""
    home = {name: group for group, name, _ in fields()}
    return _answer(key, lambda name: f"`{name}` under `{home[name]}:`") or nearest(key, valid)


def _answer(name: str, text_of: Callable[[str], str]) -> str:
    """Return ``: use ...`` with settings formatted by ``text_of``, or "" for an unknown name."""
    key = name.lower().replace("-", "_")
    if key in SAME:
        return f": use {text_of(SAME[key])}"
    by_prefix = next((text for word, text in PREFIXES.items() if key.startswith(f"{word}_")), "")
    text = DIFFERENT.get(key, by_prefix)
    return text and ": " + re.sub(r"\{(\w+)\}", lambda match: text_of(match[1]), text)
