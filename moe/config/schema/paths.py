"""Paths that a user names: they lie on a mounted file system and are no addresses."""

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
    """Why ``text`` is no path of a file system, with the remedy; None where it may be one."""
    if address := _ADDRESS.match(text):
        scheme, rest = address.groups()
        if scheme.lower() == "file":
            return f"an address, not a path: give the path alone, {rest}"
        return (
            f"an address, not a path: remote storage ({scheme}://) is not supported; give a path "
            "on a mounted file system, and copy or mount what lies elsewhere"
        )
    if not text:
        return "empty: give a path (an unset variable of the shell?)"
    if variable := _VARIABLE.search(text):
        return f"the variable {variable[1]} is not expanded here: write its value"
    return None


def local_path(text: str) -> str:
    """``text`` with a leading ``~`` expanded; raises Rule where it is no path."""
    if problem := path_problem(text):
        raise Rule(problem)
    return os.path.expanduser(text)  # noqa: PTH111 - Path's raises for ~nobody


LocalPath = Annotated[
    str, Field(coerce_numbers_to_str=True), Kind("path"), AfterValidator(local_path)
]
"""The type of every setting that names a file, a folder or a prefix of files. A recipe may write a
name, or a weight among prefixes, as a number."""


class ToolParser(argparse.ArgumentParser):
    """The parser of every tool: arguments of text or of type Path are paths, and are checked.

    An argument that is free text says ``type=str``. The description is shown as it is written.
    """

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)
        self.register("type", None, _checked)
        self.register("type", Path, lambda text: Path(_checked(text)))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; an unknown flag is answered with the nearest one."""
        given, extras = self.parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in extras if word.startswith("-")]
        if flags:
            known = [name for action in self._actions for name in action.option_strings]
            self.error("; ".join(f"unknown flag {flag}{nearest(flag, known)}" for flag in flags))
        if extras:
            self.error(f"unexpected argument {extras[0]!r}: it follows no flag")
        return given

    def add_foreign(self, answers: Mapping[str, str]) -> None:
        """Answer flags of another program's tool of the same purpose."""
        for flag, answer in answers.items():
            hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            self.add_argument(flag, nargs="*", action=_Foreign, const=answer, **hidden)

    def add_subparsers(self, **settings: Any) -> Any:
        """As argparse's; the words of a command are checked by its own parser."""
        commands = super().add_subparsers(**settings)
        commands.type = str
        return commands


class _Foreign(argparse.Action):
    """A flag that another program has: its use ends with the answer."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        parser.error(f"unknown flag {option}: {self.const}")


def _checked(text: str) -> str:
    """``local_path`` with argparse's error."""
    try:
        return local_path(text)
    except Rule as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
