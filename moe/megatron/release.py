"""The installed release of megatron-core, from its metadata: nothing is imported."""

import re
from importlib import metadata


def installed_release() -> str:
    """Return the installed version."""
    return metadata.version("megatron-core")


def is_newer(version: str) -> bool:
    """Return whether ``version`` is of a later minor release than the one installed."""
    return _minor(version) > _minor(installed_release())


def _minor(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)[:2]]
