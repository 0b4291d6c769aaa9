"""Reversible patches of attributes and of constants in functions."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Patch:
    """Assignment of ``value`` to ``owner.name``."""

    owner: Any
    name: str
    value: Any

    def apply(self) -> "Patch":
        """Set the attribute and return the patch that undoes it."""
        before = getattr(self.owner, self.name, _ABSENT)
        if self.value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.value)
        return Patch(self.owner, self.name, before)


def with_constants(function: Any, replacements: Mapping[str, str]) -> Patch:
    """Return the patch that replaces string constants in the code of one function.

    Narrower than a patch of the called function: ``torch.zeros(1, device="cuda")`` in one function
    of megatron-core becomes ``device="cpu"``, while ``torch.zeros`` is unchanged.

    Args:
        function: a function, or a method of a class; decorators are unwrapped.
        replacements: full constants, old -> new; also in tuples and nested functions.

    Raises:
        LookupError: a constant is absent, so megatron-core is another version.
    """
    target = inspect.unwrap(getattr(function, "__func__", function))
    assert isinstance(target, FunctionType)
    missing = set(replacements)
    code = _rewrite(target.__code__, replacements, missing)
    if missing:
        raise LookupError(f"{target.__qualname__} has no constant {sorted(missing)}")
    return Patch(target, "__code__", code)


def _rewrite(code: CodeType, replacements: Mapping[str, str], missing: set[str]) -> CodeType:
    def convert(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return _rewrite(constant, replacements, missing)
        if isinstance(constant, tuple):
            return tuple(convert(item) for item in constant)
        if isinstance(constant, str) and constant in replacements:
            missing.discard(constant)
            return replacements[constant]
        return constant

    return code.replace(co_consts=tuple(convert(constant) for constant in code.co_consts))
