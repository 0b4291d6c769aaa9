"""Command-line flags, generated from the settings tree.

argparse, not a typed command-line library: Megatron's flags are flat while settings are a tree, and
all problems of flags and recipe are reported together, whereas such libraries stop at the first.
Values remain text here; pydantic validates flags and recipe together (validate.py).
"""

import argparse
import shutil
import textwrap
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
    negative_flag_name,
    type_text,
)
from moetron.moe.config.schema.settings import Settings, fields
from moetron.moe.config.synonyms import flag_answer

_USAGE = "pretrain_moe.py [--config RECIPE.yaml ...] [--flag value ...]"
_EPILOG = (
    "Flags win over the recipe. An optional setting is unset by the value 'none'. A switch needs no"
    " value, but takes true or false."
)
_HELP_WIDTH = 100
_HELP_COLUMN = 30
_TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "0"), False
)
"""Values of a switch."""
_OWN_SWITCHES = ("dry_run", "build")
"""Options of the command that take no value."""
_MISSING = object()


@dataclass
class Given:
    """Unchecked command line."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Group -> field -> text, list of texts, switch or None."""
    options: dict[str, Any] = field(default_factory=dict)
    """The command's own options: config, dry_run, check, world_size, rank, build."""
    problems: list[str] = field(default_factory=list)


class _Parser(argparse.ArgumentParser):
    """Parser that raises ConfigError in place of exiting."""

    def error(self, message: str) -> Any:
        raise ConfigError([message])


class _Formatter(argparse.HelpFormatter):
    """Formatter that wraps only at spaces and keeps ``[default: X]`` and paragraphs intact."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns - 2, _HELP_WIDTH)
        super().__init__(prog, max_help_position=_HELP_COLUMN, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = []
        for paragraph in text.split("\n\n"):
            lines += textwrap.wrap(paragraph, width, break_on_hyphens=False)
        return [line.replace("\xa0", " ") for line in lines]

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """Show ``--flag X``; a missing value passes argparse and is reported later."""
        metavar = str(action.metavar or default_metavar)
        return f"{metavar} ..." if action.nargs == "*" else metavar

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


class _Switch(argparse.Action):
    """Pair of flags that turn a switch on and off.

    Both also take a truth value; any other value remains text, for pydantic to refuse.
    """

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        turned: Any = _TRUTH.get(str(values).lower(), values)
        if option != self.option_strings[0]:
            turned = False if turned is True else _Refused(f"{option} {values}")
        setattr(namespace, self.dest, turned)


@dataclass(frozen=True)
class _Refused:
    """Flag that turns a switch off, given with a value other than true."""

    text: str


def default_text(setting: FieldInfo) -> str:
    """Return a field's default for help and docs."""
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
    note = note.replace(" ", "\xa0")
    help_text = f"{setting.description} [{note}]".replace("%", "%%")
    common = {"dest": name, "default": argparse.SUPPRESS, "help": help_text}
    flag = flag_name(name)
    if is_switch(setting):
        names = flag, negative_flag_name(name, setting)
        group.add_argument(*names, action=_Switch, nargs="?", const=True, **common)
    elif is_list(setting):
        group.add_argument(flag, nargs="*", metavar="X", **common)
    else:
        words = literals(setting)
        metavar = "{" + ",".join(words) + "}" if words else type_text(setting).split()[0].upper()
        group.add_argument(flag, nargs="?", const=_MISSING, metavar=metavar, **common)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options, which are not settings."""
    command = parser.add_argument_group("command")
    value: dict[str, Any] = {"nargs": "?", "const": _MISSING, "default": argparse.SUPPRESS}
    switch: dict[str, Any] = {**value, "action": _Switch, "const": True}
    command.add_argument(
        "--config",
        action="append",
        metavar="RECIPE.yaml",
        help="recipe: a section for each group below; if repeated, later recipes win key by key",
        **value,
    )
    command.add_argument(
        "--dry-run",
        help="check everything, print the plan, train nothing",
        **switch,
    )
    command.add_argument(
        "--check",
        action="store_true",
        default=argparse.SUPPRESS,
        help="check settings, data and folders as a start with --world-size ranks does; then exit",
    )
    command.add_argument(
        "--world-size", metavar="N", help="ranks to plan or check for (--dry-run, --check)", **value
    )
    command.add_argument("--rank", metavar="R", help="rank to plan for (with --dry-run)", **value)
    command.add_argument(
        "--build",
        help="build that rank's shard without memory and compare it with the plan (with --dry-run)",
        **switch,
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of all flags, in the groups of the settings tree."""
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
    """Yield all flags."""
    yield from ("--help", "--config", "--dry-run", "--check", "--world-size", "--rank", "--build")
    for _, name, setting in fields():
        yield flag_name(name)
        if is_switch(setting):
            yield negative_flag_name(name, setting)


def _unknown(extras: Sequence[str], valid: Sequence[str]) -> list[str]:
    """Return a problem for each unknown flag, else for each value without a flag."""
    problems = []
    for extra in extras:
        if extra.startswith("-"):
            name = extra.split("=", 1)[0]
            problems.append(f"unknown flag {name}{flag_answer(name, valid)}")
    return problems or [_stray(extra, valid) for extra in extras]


def _stray(word: str, valid: Sequence[str]) -> str:
    """Return the problem of a word without a flag."""
    name, equals, value = word.partition("=")
    flag = flag_name(name.rpartition(".")[2])
    remedy = f"; write {flag} {value}" if equals and flag in valid else ""
    return f"unexpected argument {word!r}: it follows no flag{remedy}"


def _explicit(argv: Sequence[str]) -> list[str]:
    """Return the command line with ``--switch=value`` for switches."""
    switches = {
        flag
        for _, name, setting in fields()
        if is_switch(setting)
        for flag in (flag_name(name), negative_flag_name(name, setting))
    }
    switches |= {flag_name(name) for name in _OWN_SWITCHES}
    words: list[str] = []
    for word in argv:
        after_switch = bool(words) and words[-1] in switches
        if after_switch and word.lower() in (*_TRUTH, "none", "null"):
            words[-1] += f"={word}"
        elif after_switch and not word.startswith("-"):
            words[-1:] = [f"{words[-1]}=true", word]
        else:
            words.append(word)
    return words


def parse(argv: Sequence[str]) -> Given:
    """Parse the command line and return all problems; only ``--help`` exits."""
    made = parser()
    try:
        namespace, extras = made.parse_known_args(_explicit(argv))
    except ConfigError as error:
        return Given(problems=error.problems)
    given = Given(problems=_unknown(extras, list(_names())))
    known = {name: (group, setting) for group, name, setting in fields()}
    for name, value in vars(namespace).items():
        if value is _MISSING or value == [] or (isinstance(value, list) and _MISSING in value):
            given.problems.append(f"{flag_name(name)} needs a value")
            if name == "config":
                given.options[name] = [path for path in value if path is not _MISSING]
        elif isinstance(value, _Refused):
            given.problems.append(
                f"{value.text}: it turns off and takes no value; {flag_name(name)} turns on"
            )
        elif name in known:
            group, setting = known[name]
            given.settings.setdefault(group, {})[name] = _plain(value, setting)
        elif name in _OWN_SWITCHES and not isinstance(value, bool):
            given.problems.append(f"{flag_name(name)} {value}: must be true or false")
        else:
            given.options[name] = value
    return given


def _plain(value: Any, setting: FieldInfo) -> Any:
    """Return None for ``none`` or ``null`` of an optional setting, else the value.

    A single word becomes a scalar if the field also takes one.
    """
    alone = value[0] if isinstance(value, list) and len(value) == 1 else value
    if is_optional(setting) and isinstance(alone, str) and alone.lower() in ("none", "null"):
        return None
    takes_scalar = int in choices(setting)
    return alone if isinstance(value, list) and takes_scalar else value
