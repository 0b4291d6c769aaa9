"""Errors of data that are the user's to mend."""


class DataError(ValueError):
    """An input, a shard or a blend cannot be used as asked; the message names it and the remedy."""
