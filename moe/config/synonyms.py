"""The answer to a name that is no setting: another program's name for one, or a misspelt one."""

import re
from collections.abc import Callable, Iterable

from moetron.moe.config.foreign_names import DIFFERENT, FAMILIES, SAME
from moetron.moe.config.schema.field import flag_name, nearest
from moetron.moe.config.schema.settings import fields


def flag_answer(flag: str, valid: Iterable[str]) -> str:
    """What to say after ``unknown flag --X``: with a separator, or empty."""
    name = flag.lstrip("-").rpartition(".")[2]  # --model.num-layers
    if name != flag.lstrip("-") and f"--{name}" in (valid := list(valid)):
        return f": use --{name}, without the group"
    return _answer(name, flag_name) or nearest(flag, valid)


def key_answer(key: str, valid: Iterable[str]) -> str:
    """What to say after a recipe's unknown key: with a separator, or empty."""
    home = {name: group for group, name, _ in fields()}
    return _answer(key, lambda name: f"`{name}` under `{home[name]}:`") or nearest(key, valid)


def _answer(name: str, said: Callable[[str], str]) -> str:
    """``: use ...`` with settings as ``said`` writes them; empty for a name that nobody knows."""
    key = name.lower().replace("-", "_")
    if key in SAME:
        return f": use {said(SAME[key])}"
    family = next((text for word, text in FAMILIES.items() if key.startswith(f"{word}_")), "")
    text = DIFFERENT.get(key, family)
    return text and ": " + re.sub(r"\{(\w+)\}", lambda match: said(match[1]), text)
