"""Writes that a crash at any instant leaves either undone or done."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers, and the disk after a crash, see the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(source: Path, target: Path) -> None:
    """Rename within a folder, and make the new name last."""
    source.rename(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
