"""Input of cross-checks, and helpers for their messages."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from moetron.common.text import value_text
from moetron.moe.config.schema.field import flag_name
from moetron.moe.config.schema.implementation import experts_impl, is_local
from moetron.moe.config.schema.settings import Settings, fields

_HOME = {name: group for group, name, _ in fields()}


@dataclass(frozen=True)
class Case:
    """Settings and the machine to run them on."""

    settings: Settings
    world_size: int
    """Number of ranks."""
    device: str
    """'cpu' or 'cuda'."""
    te: bool
    """Transformer Engine is believed usable."""

    @property
    def local(self) -> bool:
        """Layers are local rather than Transformer Engine's."""
        return is_local(self.settings, self.te_on_gpu)

    @property
    def te_on_gpu(self) -> bool:
        """Transformer Engine's kernels are believed usable, in layers of either kind."""
        return self.te and self.device == "cuda"

    @property
    def experts_impl(self) -> Literal["grouped_mm", "te", "sequential"]:
        """Implementation of experts."""
        return experts_impl(self.settings, self.local)

    def given(self, *names: str) -> str:
        """Return ``--flag value`` of the named settings, joined by 'and'."""
        return given(self.settings, *names)


def given(settings: Settings, *names: str) -> str:
    """Return ``--flag value`` of the named settings, joined by 'and'."""
    values = {name: getattr(getattr(settings, _HOME[name]), name) for name in names}
    return " and ".join(_flag_text(name, value) for name, value in values.items())


def _flag_text(name: str, value: Any) -> str:
    if value is None or value is True:
        return flag_name(name)
    if value is False:
        return f"{flag_name(name)} (off)"
    return f"{flag_name(name)} {value_text(value)}".rstrip()


def nearest_multiples(number: int, unit: int, plus: int = 0) -> str:
    """Return the multiples of ``unit`` around ``number``, each plus ``plus``: ``8 or 12``."""
    below = number // unit * unit
    above = str(below + unit + plus)
    return f"{below + plus} or {above}" if below else above


def nearest_divisors(number: int, near: int) -> str:
    """Return the divisors of ``number`` around ``near``: ``4 or 8``."""
    below = next(d for d in range(min(near, number), 0, -1) if number % d == 0)
    above = next((d for d in range(near, number + 1) if number % d == 0), below)
    return f"{below} or {above}" if above != below else str(below)


def not_multiple(case: Case, name: str, number: int, unit_name: str, unit: int) -> Iterator[str]:
    """Yield a line if setting ``name`` (``number``) is not a multiple of ``unit_name``."""
    if number % unit:
        yield (
            f"{flag_name(name)} {number} is not a multiple of {flag_name(unit_name)} {unit}: "
            f"use {flag_name(name)} {nearest_multiples(number, unit)}, "
            f"or {flag_name(unit_name)} {nearest_divisors(number, unit)}"
        )
