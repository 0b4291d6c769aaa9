"""Errors that print as a message without a traceback."""

from collections.abc import Sequence
from pathlib import Path


class UserError(ValueError):
    """Error that the user can fix: printed without a traceback, exit code 2."""


class RunError(RuntimeError):
    """Failure of a run that is not a bug: printed without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """All problems of a configuration, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"{head} in the settings:\n" + "\n".join(f"  - {p}" for p in problems))


class ReadFailed(UserError):
    """I/O error on an input that may be sound: work done from it stays valid."""


def unreadable(file: Path, error: Exception) -> UserError:
    """Return ReadFailed for a system error, which has an errno, else UserError."""
    failed = isinstance(error, OSError) and error.errno is not None
    return (ReadFailed if failed else UserError)(f"{file}: cannot be read ({error})")
