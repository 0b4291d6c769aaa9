"""What every cross-check looks at, and the words it answers with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moetron.common.text import value_text
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.implementation import is_local
from moetron.moe.config.schema.settings import Settings, fields

_HOME = {name: group for group, name, _ in fields()}


@dataclass(frozen=True)
class Case:
    """Settings, and where they are to run."""

    settings: Settings
    world_size: int
    """Ranks of the whole job."""
    device: str
    """'cpu' or 'cuda'."""
    te: bool
    """Whether Transformer Engine can be used, as far as is known."""

    @property
    def local(self) -> bool:
        """Whether layers come from our own modules rather than Transformer Engine's."""
        return is_local(self.settings, self.te and self.device == "cuda")

    def said(self, *names: str) -> str:
        """``--flag value`` of the named settings, joined by 'and'."""
        return said(self.settings, *names)


def said(settings: Settings, *names: str) -> str:
    """``--flag value`` of the named settings, joined by 'and'."""
    values = {name: getattr(getattr(settings, _HOME[name]), name) for name in names}
    return " and ".join(_flag_text(name, value) for name, value in values.items())


def _flag_text(name: str, value: Any) -> str:
    if value is None or value is True:
        return flag_name(name)
    if value is False:
        return f"{flag_name(name)} (off)"
    return f"{flag_name(name)} {value_text(value)}".rstrip()


def nearest_multiples(number: int, unit: int, plus: int = 0) -> str:
    """The multiples of ``unit`` on both sides of ``number``, each ``plus`` more: ``8 or 12``."""
    below = number // unit * unit
    above = str(below + unit + plus)
    return f"{below + plus} or {above}" if below else above


def nearest_divisors(number: int, near: int) -> str:
    """The divisors of ``number`` on both sides of ``near``: ``4 or 8``."""
    below = next(d for d in range(min(near, number), 0, -1) if number % d == 0)
    above = next((d for d in range(near, number + 1) if number % d == 0), below)
    return f"{below} or {above}" if above != below else str(below)


def not_multiple(case: Case, name: str, number: int, unit_name: str, unit: int) -> Iterator[str]:
    """A line if setting ``name`` (worth ``number``) is no multiple of ``unit_name`` (``unit``)."""
    if number % unit:
        yield (
            f"{flag_name(name)} {number} is not a multiple of {flag_name(unit_name)} {unit}: "
            f"use {flag_name(name)} {nearest_multiples(number, unit)}, "
            f"or {flag_name(unit_name)} {nearest_divisors(number, unit)}"
        )
