"""The base of every settings group, and what a field can say beyond its type."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Group(BaseModel):
    """A group of settings: frozen, strict about unknown keys, documented by field docstrings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def negative_flag(default: bool, name: str) -> Any:
    """A switch whose "off" flag is ``--name`` (Megatron's word for it) instead of ``--no-...``."""
    return Field(default=default, json_schema_extra={"negative_flag": name})
