"""Checks of user-given paths, which must be on a mounted file system."""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from moetron.moe.config.schema.field import Kind, Rule, nearest

_ADDRESS = re.compile(r"(?:[\w.-]+=)?([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
"""``scheme://rest``, also as ``NAME=scheme://rest``."""
_VARIABLE = re.compile(r"(?:^|/)(\$(?:\w+|\{\w+\}))")


def path_problem(text: str) -> str | None:
    """Return why ``text`` is not a file-system path, with the remedy, or None."""
    if address := _ADDRESS.match(text):
        scheme, rest = address.groups()
        if scheme.lower() == "file":
            return f"an address, not a path: give the path alone, {rest}"
        return (
            f"an address, not a path: remote storage ({scheme}://) is not supported; give a path "
            "on a mounted file system"
        )
    if not text:
        return "empty: give a path (unset shell variable?)"
    if variable := _VARIABLE.search(text):
        return f"the variable {variable[1]} is not expanded here: write its value"
    return None


def local_path(text: str) -> str:
    """Return ``text`` with a leading ``~`` expanded; raise Rule if it is not a path."""
    if problem := path_problem(text):
        raise Rule(problem)
    return os.path.expanduser(text)  # noqa: PTH111 - Path's raises for ~nobody


LocalPath = Annotated[
    str, Field(coerce_numbers_to_str=True), Kind("path"), AfterValidator(local_path)
]
"""Type of settings that name a file, a folder or a prefix. Numbers in a recipe become text."""


class ToolParser(argparse.ArgumentParser):
    """Parser of tools: checks arguments without a type or of type Path as paths.

    Free text needs ``type=str``. The description is shown unwrapped.
    """

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)
        self.register("type", None, _checked)
        self.register("type", Path, lambda text: Path(_checked(text)))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; suggest the nearest flag for an unknown one."""
        given, extras = self.parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in extras if word.startswith("-")]
        if flags:
            known = [name for action in self._actions for name in action.option_strings]
            self.error("; ".join(f"unknown flag {flag}{nearest(flag, known)}" for flag in flags))
        if extras:
            self.error(f"unexpected argument {extras[0]!r}: it follows no flag")
        return given

    def add_foreign(self, answers: Mapping[str, str]) -> None:
        """Add flags of another program's similar tool, each refused with a hint."""
        for flag, answer in answers.items():
            hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            self.add_argument(flag, nargs="*", action=_Foreign, const=answer, **hidden)

    def add_subparsers(self, **settings: Any) -> Any:
        """Add subparsers as argparse does, without checking command names as paths."""
        commands = super().add_subparsers(**settings)
        commands.type = str
        return commands


class _Foreign(argparse.Action):
    """Flag of another program; using it is an error with a hint."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        parser.error(f"unknown flag {option}: {self.const}")


def _checked(text: str) -> str:
    """Return ``local_path`` of a text, with argparse's error type."""
    try:
        return local_path(text)
    except Rule as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
