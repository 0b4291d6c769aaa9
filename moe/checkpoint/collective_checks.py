"""Checks that all ranks make together: of a checkpoint's files, of space, of older checkpoints."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from moetron.common.errors import RunError, UserError
from moetron.common.files import write_text
from moetron.moe.checkpoint import run_folder as checkpoint_folder
from moetron.moe.checkpoint.checksums import Sums, share
from moetron.moe.checkpoint.run_folder import DamagedError
from moetron.moe.config.schema.settings import Settings

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def verify_together(folder: Path) -> None:
    """Check every file against its sum, files divided among ranks; all raise the first error."""
    with verifying(folder):
        pass


@contextmanager
def verifying(folder: Path) -> Iterator[Sums]:
    """Check every file against its sum, files divided among ranks.

    The block gets the files that this rank sums, to do so while it reads them; the others are read
    after it. It may end with a UserError, on all ranks alike. Damage explains it: it is raised
    instead, on all ranks.

    Raises:
        DamagedError: after the block, the first rank's.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    record = on_all_ranks(partial(checkpoint_folder.read_record, folder))
    sums = Sums(frozenset(share(record.files, rank, ranks)))
    check = partial(checkpoint_folder.verify, folder, rank, ranks, sums.found)
    try:
        yield sums
    except UserError:
        on_all_ranks(check)
        raise
    on_all_ranks(check)


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run ``action`` on every rank and return its result; all raise the first UserError of any."""
    found: list[UserError | None] = [None] * dist.get_world_size()
    result, mine = None, None
    try:
        result = action()
    except UserError as error:
        mine = error
    # All-gather over all ranks: a rank that raised alone would leave the others waiting in the
    # next collective.
    dist.all_gather_object(found, mine)
    for failure in filter(None, found):
        raise failure
    return cast(Result, result)


def fall_back(settings: Settings) -> Settings:
    """Return settings whose --load is the newest sound checkpoint (collective over all ranks).

    Rank 0 prints what is wrong with newer ones. If this run saves where it loads, they are renamed
    to ``.damaged``, and ``latest`` names the sound one.

    Raises:
        UserError: none is sound; names each with its damage.
    """
    options = settings.checkpoint
    path = Path(str(options.load))
    folders = on_rank_0(lambda: checkpoint_folder.candidates(path, fallback=True))
    damage: list[str] = []
    for folder in folders:
        try:
            verify_together(folder)
        except DamagedError as error:
            damage.append(str(error))
            if dist.get_rank() == 0:
                logger.warning("--load-fallback: %s", error)
            continue
        if damage and options.load == options.save:
            on_rank_0(partial(_resume_from, folder, folders))
        chosen = options.model_copy(update={"load": str(folder)})
        return settings.model_copy(update={"checkpoint": chosen})
    raise UserError(f"--load {path}: no checkpoint is sound:\n" + "\n".join(damage))


def _resume_from(folder: Path, newest_first: list[Path]) -> None:
    for newer in newest_first[: newest_first.index(folder)]:
        checkpoint_folder.set_aside(newer)
    write_text(folder.parent / checkpoint_folder.LATEST, folder.name + "\n")


def require_space(folder: Path, size_bytes: int) -> None:
    """Raise RunError on all ranks if the disk of ``folder`` cannot hold what they want to write."""
    sizes: list[Any] = [None] * dist.get_world_size()
    # Gather to rank 0, which alone asks the file system.
    dist.gather_object(size_bytes, sizes if dist.get_rank() == 0 else None, dst=0)

    def check() -> None:
        needed, free = sum(sizes), shutil.disk_usage(folder).free
        if needed > free:
            folder.rmdir()
            raise RunError(
                f"cannot write {folder}: needs {needed / 1e9:,.3f} GB, and {free / 1e9:,.3f} GB "
                "are free; checkpoints before it are untouched"
            )

    on_rank_0(check)


def on_rank_0(action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0; all ranks return its result or raise its error."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    # Broadcast from rank 0 to all ranks: also the barrier after a change of the file system.
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result
