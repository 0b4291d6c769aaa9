"""Errors that are a message, not a traceback."""

from collections.abc import Sequence
from pathlib import Path


class UserError(ValueError):
    """Something that the user must change: printed without a traceback, exit code 2."""


class RunError(RuntimeError):
    """What ends a run without being anybody's bug: printed without a traceback, exit code 1."""


class ConfigError(UserError):
    """Every problem of a configuration at once, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"{head} in the settings:\n" + "\n".join(f"  - {p}" for p in problems))


class ReadFailed(UserError):
    """The machine could not read an input that may be sound: what was done with it stays good."""


def unreadable(file: Path, error: Exception) -> UserError:
    """What to raise where reading a file ended so: only the system's own errors have a number."""
    failed = isinstance(error, OSError) and error.errno is not None
    return (ReadFailed if failed else UserError)(f"{file}: cannot be read ({error})")
