"""Command-line flags, generated from the settings tree.

argparse rather than a typed command-line library: Megatron's flags are flat while the settings are
a tree, and a user wants every problem of flags and recipe in one message, whereas such libraries
stop at the first. So values stay text here, and pydantic judges flags and recipe together
(validate.py).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from moetron.common.errors import ConfigError
from moetron.moe.config.schema.field import (
    choices,
    flag_name,
    is_list,
    is_optional,
    is_switch,
    literals,
    nearest,
    negative_flag_name,
    type_text,
)
from moetron.moe.config.schema.settings import Settings, fields

_USAGE = "pretrain_moe.py [--config RECIPE.yaml ...] [--flag value ...]"
_EPILOG = "Flags win over the recipe. An optional setting is unset by the value 'none'."
_MISSING = object()


@dataclass
class Given:
    """What the command line says, still unchecked."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Group -> field -> text, list of texts, switch or None."""
    options: dict[str, Any] = field(default_factory=dict)
    """The command's own options: config, dry_run, check, world_size, rank, build."""
    problems: list[str] = field(default_factory=list)


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting; only ``--switch=value`` still gets here."""

    def error(self, message: str) -> Any:
        raise ConfigError([message])


class _Formatter(argparse.HelpFormatter):
    """Shows ``--flag X`` although a missing value passes, to be reported with all else."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        metavar = str(action.metavar or default_metavar)
        return f"{metavar} ..." if action.nargs == "*" else metavar


class _Switch(argparse.Action):
    """Two flags of one switch: the first turns it on, the second off."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, option == self.option_strings[0])


def default_text(setting: FieldInfo) -> str:
    """A field's default as help and docs show it."""
    if setting.is_required():
        return "required"
    if setting.default is None:
        return "unset"
    if is_switch(setting):
        return "on" if setting.default else "off"
    return str(setting.default)


def _add(group: Any, name: str, setting: FieldInfo) -> None:
    """Add one setting's flag (or pair of flags) to an argparse group."""
    note = default_text(setting)
    note = note if note == "required" else f"default: {note}"
    help_text = f"{setting.description} [{note}]".replace("%", "%%").replace("\n", " ")
    common = {"dest": name, "default": argparse.SUPPRESS, "help": help_text}
    flag = flag_name(name)
    if is_switch(setting):
        group.add_argument(
            flag, negative_flag_name(name, setting), action=_Switch, nargs=0, **common
        )
    elif is_list(setting):
        group.add_argument(flag, nargs="*", metavar="X", **common)
    else:
        words = literals(setting)
        metavar = "{" + ",".join(words) + "}" if words else type_text(setting).split()[0].upper()
        group.add_argument(flag, nargs="?", const=_MISSING, metavar=metavar, **common)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are the command's own and no settings."""
    command = parser.add_argument_group("command")
    value: dict[str, Any] = {"nargs": "?", "const": _MISSING, "default": argparse.SUPPRESS}
    command.add_argument(
        "--config",
        action="append",
        metavar="RECIPE.yaml",
        help="recipe: a section for each group below; given again, the later one wins key by key",
        **value,
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help="check everything, print the plan, train nothing",
    )
    command.add_argument(
        "--check",
        action="store_true",
        default=argparse.SUPPRESS,
        help="check settings, data and folders as a start with --world-size ranks does; then stop",
    )
    command.add_argument(
        "--world-size", metavar="N", help="ranks to plan or check for (--dry-run, --check)", **value
    )
    command.add_argument("--rank", metavar="R", help="rank to plan for (with --dry-run)", **value)
    command.add_argument(
        "--build",
        action="store_true",
        default=argparse.SUPPRESS,
        help="build that rank's share without memory and compare it with the plan (with --dry-run)",
    )


def parser() -> argparse.ArgumentParser:
    """The parser of every flag, in the groups of the settings tree."""
    made = _Parser(
        prog="pretrain_moe.py",
        usage=_USAGE,
        epilog=_EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _add_options(made)
    groups = {}
    for name, group in Settings.model_fields.items():
        assert group.annotation is not None
        groups[name] = made.add_argument_group(name, group.annotation.__doc__)
    for group_name, name, setting in fields():
        _add(groups[group_name], name, setting)
    return made


def _names() -> Iterator[str]:
    """Every flag there is."""
    yield from ("--help", "--config", "--dry-run", "--check", "--world-size", "--rank", "--build")
    for _, name, setting in fields():
        yield flag_name(name)
        if is_switch(setting):
            yield negative_flag_name(name, setting)


def _unknown(extras: Sequence[str], valid: Sequence[str]) -> list[str]:
    """One problem for each unknown flag, or for each value that belongs to no flag."""
    problems = []
    for extra in extras:
        if extra.startswith("-"):
            name = extra.split("=", 1)[0]
            problems.append(f"unknown flag {name}{nearest(name, valid)}")
    if not problems:
        problems = [f"unexpected argument {extra!r}: it follows no flag" for extra in extras]
    return problems


def parse(argv: Sequence[str]) -> Given:
    """Read the command line. Only ``--help`` exits; every problem is returned, none is raised."""
    made = parser()
    try:
        namespace, extras = made.parse_known_args(list(argv))
    except ConfigError as error:
        return Given(problems=error.problems)
    given = Given(problems=_unknown(extras, list(_names())))
    known = {name: (group, setting) for group, name, setting in fields()}
    for name, value in vars(namespace).items():
        if value is _MISSING or value == [] or (isinstance(value, list) and _MISSING in value):
            given.problems.append(f"{flag_name(name)} needs a value")
        elif name in known:
            group, setting = known[name]
            given.settings.setdefault(group, {})[name] = _plain(value, setting)
        else:
            given.options[name] = value
    return given


def _plain(value: Any, setting: FieldInfo) -> Any:
    """``none``, or YAML's ``null``, as None for an optional setting.

    One text becomes a scalar where a field takes both.
    """
    alone = value[0] if isinstance(value, list) and len(value) == 1 else value
    if is_optional(setting) and isinstance(alone, str) and alone.lower() in ("none", "null"):
        return None
    takes_scalar = int in choices(setting)
    return alone if isinstance(value, list) and takes_scalar else value
