"""Errors of data that are the user's to mend."""

from pathlib import Path


class DataError(ValueError):
    """An input, a shard or a blend cannot be used as asked; the message names it and the remedy."""


class ReadFailed(DataError):
    """The machine could not read an input that may be sound: what was done with it stays good."""


def unreadable(file: Path, error: Exception) -> DataError:
    """What to raise where reading a file ended so: only the system's own errors have a number."""
    failed = isinstance(error, OSError) and error.errno is not None
    return (ReadFailed if failed else DataError)(f"{file}: cannot be read ({error})")
