"""Roles of settings: what a setting decides, when it may change, whether it is exported."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, TypeVar

from pydantic.fields import FieldInfo

T = TypeVar("T")


class Role(Enum):
    """Effect of a setting, and so when it may change."""

    SHAPE = "shape"
    """Set of tensors; a checkpoint with another value is never loaded."""
    FUNCTION = "function"
    """Function of the tensors, or the optimizer's state; only --finetune may change it."""
    TRAINING = "training"
    """Training procedure; a resumed run may change it and reports the change."""
    RUN = "run"
    """Saving, evaluation, logging, paths; a resumed run may change it without a report."""


@dataclass(frozen=True)
class Export:
    """Export to converted models, where it differs from the role's default."""

    shown: bool


Shape = Annotated[T, Role.SHAPE]
Function = Annotated[T, Role.FUNCTION]
Training = Annotated[T, Role.TRAINING]
Run = Annotated[T, Role.RUN]
Exported = Annotated[T, Export(True)]
"""A training setting that a converted model shows or that its function depends on."""
Unexported = Annotated[T, Export(False)]
"""A setting of shape or function that a converted dropless model does not show."""


def role_of(field: FieldInfo, default: Role | None) -> Role:
    """Return a field's role: its own, else its group's default.

    Raises:
        TypeError: it has neither.
    """
    role = next((entry for entry in field.metadata if isinstance(entry, Role)), default)
    if role is None:
        raise TypeError("a field of this group needs a role: Shape, Function, Training or Run")
    return role


def is_exported(field: FieldInfo, role: Role) -> bool:
    """Return whether a model converted to another format shows the setting."""
    own = [entry.shown for entry in field.metadata if isinstance(entry, Export)]
    return own[0] if own else role in (Role.SHAPE, Role.FUNCTION)
