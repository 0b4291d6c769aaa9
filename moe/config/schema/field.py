"""Base class of settings groups, and inspection of their fields."""

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from moetron.moe.config.schema.roles import Role

_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}
_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True)
class Kind:
    """Name of a text type in help and messages; part of an Annotated type."""

    name: str


_OFF = ("no", "disable")
"""First words of a name that turns something off."""


class Rule(ValueError):
    """Validation error that states rule and remedy in place of the field's type."""


class Group(BaseModel):
    """Group of settings: frozen, refuses unknown keys, documented by field docstrings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    default_role: ClassVar[Role | None] = None
    """Role of fields that name none; None: every field names its own."""

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switch_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``num_layers: yes``, which would become 1."""
        assert info.field_name is not None
        if isinstance(value, bool) and bool not in choices(cls.model_fields[info.field_name]):
            raise ValueError("must not be a truth value")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _split_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Split one text for a list of words or numbers at spaces, as Megatron does."""
        assert info.field_name is not None
        field = cls.model_fields[info.field_name]
        return value.split() if isinstance(value, str) and takes_words(field) else value


def negative_flag(default: bool, name: str) -> Any:
    """Return a switch field whose "off" flag is Megatron's ``--name``, not ``--no-...``."""
    return Field(default=default, json_schema_extra={"negative_flag": name})


def flag_name(field_name: str) -> str:
    """Return the flag of a field: ``num_layers`` -> ``--num-layers``."""
    return "--" + field_name.replace("_", "-")


def negative_flag_name(field_name: str, field: FieldInfo) -> str:
    """Return the flag that turns a switch off: ``--no-...`` unless the field names another.

    ``no_load_optim`` -> ``--load-optim``.
    """
    extra = field.json_schema_extra
    own = extra.get("negative_flag") if isinstance(extra, dict) else None
    if own:
        return f"--{own}"
    positive = field_name.removeprefix("no_")
    return flag_name(f"no_{field_name}" if positive == field_name else positive)


def _branches(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, or the annotation itself if it is not a union."""
    if get_origin(annotation) in (Union, types.UnionType):
        yield from get_args(annotation)
    else:
        yield annotation


def _bare(annotation: Any) -> Any:
    """Return an annotation without its constraints."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def choices(field: FieldInfo) -> list[Any]:
    """Return the types of a field without constraints: ``PositiveInt | None`` -> [int, None]."""
    return [_bare(branch) for branch in _branches(field.annotation)]


def literals(field: FieldInfo) -> list[str]:
    """Return the words of a field's Literal types."""
    return [word for choice in choices(field) for word in get_args(choice) if isinstance(word, str)]


def is_optional(field: FieldInfo) -> bool:
    """Return whether a field can be unset (``null`` in YAML, ``none`` as a flag)."""
    return type(None) in choices(field)


def is_switch(field: FieldInfo) -> bool:
    """Return whether a field is a switch."""
    return bool in choices(field)


def is_list(field: FieldInfo) -> bool:
    """Return whether a field takes several values."""
    return any(get_origin(choice) in (list, tuple) for choice in choices(field))


def takes_words(field: FieldInfo) -> bool:
    """Return whether a field takes only lists of words or numbers."""
    kinds = [choice for choice in choices(field) if choice is not type(None)]
    return all(
        get_origin(kind) in (list, tuple) and _bare(get_args(kind)[0]) in _NAMES for kind in kinds
    )


def _bounds(constraints: tuple[Any, ...]) -> str:
    parts = []
    for constraint in constraints:
        if isinstance(constraint, FieldInfo):  # Annotated[int, Field(ge=0)]
            parts.append(_bounds(tuple(constraint.metadata)))
        if type(constraint) in _BOUNDS:
            attribute, sign = _BOUNDS[type(constraint)]
            parts.append(f"{sign} {getattr(constraint, attribute)}")
    return ", ".join(parts)


def _type_text(annotation: Any, constraints: tuple[Any, ...] = ()) -> str:
    if get_origin(annotation) is Annotated:
        bare, *own = get_args(annotation)
        return _type_text(bare, (*own, *constraints))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of ({_type_text(get_args(annotation)[0])})"
    if get_origin(annotation) is tuple:
        return f"{len(get_args(annotation))} x ({_type_text(get_args(annotation)[0])})"
    if issubclass(annotation, Group):
        return "mapping of " + ", ".join(annotation.model_fields)
    kinds = [constraint.name for constraint in constraints if isinstance(constraint, Kind)]
    return f"{kinds[0] if kinds else _NAMES[annotation]} {_bounds(constraints)}".rstrip()


def type_text(field: FieldInfo) -> str:
    """Return a field's type in words: ``integer > 0``, ``one of adam, sgd``, ``list of (text)``."""
    branches = [branch for branch in _branches(field.annotation) if branch is not type(None)]
    return " or ".join(_type_text(branch, tuple(field.metadata)) for branch in branches)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the valid name that ``name`` misspells, else "".

    Every word of ``name`` must be a word of the valid name, misspelt or shortened; the valid name
    may have one more word. Both turn something on, or both turn something off.
    """
    found = [word for word in valid if _misspells(_words(name), _words(word))]
    best = max(found, key=lambda word: _ratio(name.lstrip("-"), word.lstrip("-")), default=None)
    return f"; did you mean {best}?" if best else ""


def _words(name: str) -> list[str]:
    """Return the words of a name: ``--num-layers`` or ``num_layers`` -> ["num", "layers"]."""
    return name.strip("-_").lower().replace("_", "-").split("-")


def _ratio(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _misspells(wrong: list[str], right: list[str]) -> bool:
    """Return whether ``wrong`` is a misspelling of ``right``."""
    if (wrong[0] in _OFF) != (right[0] in _OFF):
        return False
    if "".join(wrong) == "".join(right):  # top-k, topk
        return True
    left = list(right)
    for word in wrong:
        close = max(left, key=lambda other: _closeness(word, other), default="")
        if _closeness(word, close) <= 0.75:
            return False
        left.remove(close)
    return len(left) <= 1


def _closeness(word: str, other: str) -> float:
    """Return 1 if one word is a prefix of the other, else their similarity ratio."""
    short, long = sorted((word, other), key=len)
    return 1.0 if len(short) > 2 and long.startswith(short) else _ratio(word, other)
