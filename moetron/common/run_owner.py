"""One owner of a run's folder: ``owner.json`` names the process that writes there.

The file holds host, process, its start, the job and the time of the claim; its time of modification
is the heartbeat, which a thread renews. So a full disk cannot stop it, and clocks of hosts need not
agree: ages are taken between two files of the same file system. For monitors, a beat also writes
what the run is doing, where the disk lets it. docs/checkpoints.md has the format.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moetron.common.errors import RunError, UserError
from moetron.common.files import read_regular, write_text
from moetron.common.parent_death import exists

logger = logging.getLogger(__name__)

FILE = "owner.json"
HEARTBEAT_S = 15.0
STALE_S = 120.0
"""Age of the heartbeat of an owner on another host that counts as dead."""
_POLL_S = 1.0
News = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Owner:
    """Contents of ``owner.json``."""

    host: str
    pid: int
    pid_namespace: str | None
    """Of Linux: containers may share a host's name, not its processes."""
    process_start: str | None
    """Boot of the host and start of the process in its ticks; None: not Linux."""
    job_id: str | None
    """SLURM_JOB_ID."""
    claimed_at: str
    """UTC, ISO 8601."""
    token: str
    """Unique to this claim."""

    def text(self) -> str:
        """Return how messages name the owner."""
        job = f", job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}, since {self.claimed_at}"


def this_process() -> Owner:
    """Return the owner that this process would be."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Owner(
        socket.gethostname(),
        os.getpid(),
        _pid_namespace(),
        _process_start(os.getpid()),
        os.environ.get("SLURM_JOB_ID"),
        now,
        uuid.uuid4().hex,
    )


class Ownership:
    """Claim of a run's folder by this process; `release` gives it back."""

    def __init__(self, folder: Path, owner: Owner, news: News) -> None:
        self._file, self._owner, self._news = folder / FILE, owner, news
        self._lost: str | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def require(self) -> None:
        """Raise RunError if another process has taken the folder over."""
        if self._lost is not None:
            raise RunError(f"{self._file} was taken over by {self._lost}; this run ends unsaved")

    def release(self) -> None:
        """Remove the file if it is still this process's."""
        self._ended.set()
        with suppress(OSError), _locked(self._file.parent):
            if (found := _read(self._file)) is not None and found.token == self._owner.token:
                self._file.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                found = _read(self._file)
                if found is not None and found.token != self._owner.token:
                    self._lost = found.text()
                    return
                if found is not None:
                    os.utime(self._file)
                self._write()
            except OSError as error:  # the storage may come back
                logger.warning("%s: no heartbeat: %s", self._file, error)

    def _write(self) -> None:
        """Write owner and news, unless another process claims the folder at this moment."""
        with _locked(self._file.parent):
            found = _read(self._file)
            mine = found is None or found.token == self._owner.token  # None: deleted by hand
            if mine and not self._ended.is_set():
                write_text(self._file, _text(self._owner, self._news()))


def _text(owner: Owner, news: dict[str, Any]) -> str:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return json.dumps({**asdict(owner), **news, "at": now}, indent=1) + "\n"


def claim(folder: Path, news: News = dict) -> Ownership:
    """Make this process the owner of an existing run folder.

    A dead owner is taken over, with a logged line. A live one with the same job id is an earlier
    life of this job, which was requeued: this waits for its end for up to ``STALE_S``. ``news``
    returns what each heartbeat adds to the file.

    Raises:
        UserError: the folder has a live owner; names it.
    """
    _wait_for_earlier_life(folder)
    with _locked(folder):
        found = _read(folder / FILE)
        if found is not None:
            _refuse_live(folder, found)
            logger.warning("%s: taken over from %s, which ended", folder / FILE, found.text())
        owner = this_process()
        write_text(folder / FILE, _text(owner, news()))
    return Ownership(folder, owner, news)


def refuse_owned(folder: Path) -> None:
    """Raise UserError if a run folder has a live owner that is not an earlier life of this job."""
    found = _read(folder / FILE)
    if found is not None and not _same_job(found):
        _refuse_live(folder, found)


def _wait_for_earlier_life(folder: Path) -> None:
    deadline_s, said = time.monotonic() + STALE_S + HEARTBEAT_S, False
    while (found := _read(folder / FILE)) is not None and _same_job(found):
        age_s = _age_s(folder)
        if not _is_alive(found, age_s) or time.monotonic() > deadline_s:
            return
        if not said:
            logger.warning("%s: waiting for %s, this job's life before", folder, found.text())
            said = True
        time.sleep(_POLL_S)


def _same_job(owner: Owner) -> bool:
    return owner.job_id is not None and owner.job_id == os.environ.get("SLURM_JOB_ID")


def _refuse_live(folder: Path, owner: Owner) -> None:
    age_s = _age_s(folder)
    if _is_alive(owner, age_s):
        raise UserError(
            f"--save {folder}: belongs to a run that has not ended: {owner.text()} (heartbeat "
            f"{age_s:.0f} s ago); stop that run or name another folder (if it is certainly gone, "
            f"delete {FILE} there)"
        )


def _is_alive(owner: Owner, age_s: float) -> bool:
    """Return whether an owner may still write: by its process on this host, else its heartbeat."""
    if owner.host != socket.gethostname() or owner.pid_namespace != _pid_namespace():
        return age_s < STALE_S
    if owner.pid == os.getpid() or not exists(owner.pid):
        return False
    start = _process_start(owner.pid)
    return owner.process_start is None or start == owner.process_start


def _age_s(folder: Path) -> float:
    """Return the age of the heartbeat by the clock of the folder's file system."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            now_s = os.fstat(file.fileno()).st_mtime
        return now_s - (folder / FILE).stat().st_mtime
    except OSError:  # a full disk; or released just now
        with suppress(OSError):
            return time.time() - (folder / FILE).stat().st_mtime
        return float("inf")


def _read(file: Path) -> Owner | None:
    """Return the owner that a file names; None: no file, or not one of ours."""
    try:
        tree: Any = json.loads(read_regular(file))
        owner = Owner(**{field.name: tree[field.name] for field in fields(Owner)})
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL):  # no regular file
            return None
        raise
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return owner if isinstance(owner.pid, int) and owner.pid > 0 else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclude other claims of the folder, where its file system has locks.

    Without locks, of two claims in the same moment the second stays, and the first run ends at its
    next heartbeat.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _pid_namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _process_start(process: int) -> str | None:
    """Return the host's boot and the process's start after it; None of a zombie or if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name in parentheses may hold anything; state and start are fields 3 and 22.
        values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if values[0] in "ZX" else f"{boot}/{values[19]}"
