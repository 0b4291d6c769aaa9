"""Paths that a user names: they lie on a mounted file system and are no addresses."""

import argparse
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from moetron.moe.config.schema.field import Kind, Rule

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
    if variable := _VARIABLE.search(text):
        return f"the variable {variable[1]} is not expanded here: write its value"
    return None


def local_path(text: str) -> str:
    """``text`` with a leading ``~`` expanded; raises Rule where it is no path."""
    if problem := path_problem(text):
        raise Rule(problem)
    return str(Path(text).expanduser()) if text.startswith("~") else text


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

    def add_subparsers(self, **settings: Any) -> Any:
        """As argparse's; the words of a command are checked by its own parser."""
        commands = super().add_subparsers(**settings)
        commands.type = str
        return commands


def _checked(text: str) -> str:
    """``local_path`` with argparse's error."""
    try:
        return local_path(text)
    except (Rule, RuntimeError) as error:  # RuntimeError: no such user's home
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
