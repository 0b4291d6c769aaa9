"""Process of a rank that writes its checkpoints while the rank trains.

On a thread of the rank, planning, hashing and writing would hold Python's global lock and take a
core: on two cores with two ranks that lengthened a step of the quick start by half. This process
forms a gloo group with those of the other ranks. Where a host has no cores to spare, it runs for a
thirteenth of the time (`RUN_S` of `TURN_S`) until the rank waits for it: low priority alone is not
enough, since a rank that wakes from a collective would wait for the writer's turn to end.
"""

import gc
import logging
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moetron.common.cores import usable_cores
from moetron.common.errors import RunError, UserError
from moetron.common.parent_death import end_with_parent
from moetron.common.stop_signal import leave_group
from moetron.moe.checkpoint.writer.shared_memory import SharedMemory, needed_bytes

logger = logging.getLogger(__name__)

BUSY_ON_GPU = 3
"""Threads of a rank on a GPU that run all the time: Python's, autograd's, NCCL's."""
NICE = 19
RUN_S = 0.003
TURN_S = 0.04
CLOSE_S = 5.0


class Contents(Protocol):
    """Tensors that a job reads."""

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors."""

    def store(self, memory: SharedMemory) -> None:
        """Copy the tensors to memory, and keep their places instead."""

    def restore(self, memory: SharedMemory) -> None:
        """Put the tensors back, from memory."""


class Job(Protocol):
    """Work that travels to the process by pickle, without the tensors of its contents."""

    @property
    def contents(self) -> Contents:
        """What travels through shared memory."""

    def __call__(self) -> Any:
        """Do the work, a collective over the default group."""


class _Nothing:
    """Job without work or contents, for which the processes only meet."""

    @property
    def contents(self) -> "_Nothing":
        return self

    def tensors(self) -> list[torch.Tensor]:
        return []

    def store(self, memory: SharedMemory) -> None:
        pass

    def restore(self, memory: SharedMemory) -> None:
        pass

    def __call__(self) -> None:
        pass


@dataclass(frozen=True)
class _Meeting:
    """Where the processes of all ranks meet: prefix in the job's store, and the store's place."""

    rank: int
    world_size: int
    timeout: timedelta
    prefix: str
    address: tuple[str, int] | str | None
    """Host and port, the path of a file, or None for one rank."""

    @staticmethod
    def of_this_job(timeout: timedelta) -> "_Meeting":
        """Agree on a meeting; a collective over all ranks."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        prefix = [uuid.uuid4().hex]
        # Broadcast from rank 0 to all ranks: a restarted job uses the same store again.
        dist.broadcast_object_list(prefix, src=0)
        store: Any = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        address: tuple[str, int] | str | None = None
        if isinstance(store, dist.TCPStore):
            address = store.host, store.port
        elif isinstance(store, dist.FileStore):
            address = store.path  # type: ignore[attr-defined]  # not in the stubs
        return _Meeting(rank, world_size, timeout, prefix[0], address)

    def join(self) -> None:
        """Start the default process group of the writers."""
        store: dist.Store
        if isinstance(self.address, tuple):
            store = dist.TCPStore(*self.address, is_master=False, timeout=self.timeout)
        elif self.address is not None:
            store = dist.FileStore(self.address, -1)
        else:
            store = dist.HashStore()
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(self.prefix, store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=self.timeout,
        )


class WriterProcess:
    """Process that does one job at a time; it ends with this one.

    Start it before CUDA and before process groups: it is forked, and has none of them.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(os.getpid(), theirs, self._pipe), name="writer", daemon=True
        )
        self._process.start()
        theirs.close()
        self._memory: SharedMemory | None = None
        self._met = False
        self._hurry = threading.Event()

    def prepare(self, job: Job, timeout: timedelta) -> Callable[[], Any]:
        """Copy what a job needs; return a function that has it done and returns its result.

        The first call is a collective over all ranks; so is what the function does. Any thread may
        call it, one at a time. The memory is kept for the next job.

        Args:
            job: the work; its contents are replaced by places in the shared memory.
            timeout: of the collectives.
        """
        needed, descriptor = needed_bytes(job.contents.tensors()), None
        if self._memory is None or self._memory.size_bytes < needed:
            self._memory = SharedMemory(needed)
            descriptor = self._memory.descriptor
        self._memory.clear()
        job.contents.store(self._memory)
        meeting = None if self._met else _Meeting.of_this_job(timeout)
        self._met = True
        self._hurry.clear()
        # Pickled here: what is not a tensor may change when training continues.
        content = reduction.ForkingPickler.dumps((meeting, descriptor is not None, needed, job))

        def do() -> Any:
            try:
                self._pipe.send_bytes(content)
                if descriptor is not None:
                    reduction.send_handle(self._pipe, descriptor, self._process.pid)
                if not has_spare_cores():
                    self._pace()
                result, error = self._pipe.recv()
            except (EOFError, OSError) as error:
                self._process.join(CLOSE_S)
                code = self._process.exitcode
                raise RuntimeError(
                    f"the process that writes the checkpoints of rank {dist.get_rank()} ended: "
                    + (f"killed by signal {-code}" if code and code < 0 else f"exit code {code}")
                ) from error
            if error is not None:
                raise error
            return result

        return do

    def meet(self, timeout: timedelta) -> None:
        """Let the processes of all ranks connect; collective over all ranks.

        At the start of a run: a network that gloo cannot use would end it at its first save.
        """
        connect = self.prepare(_Nothing(), timeout)
        self.hurry()
        connect()

    def hurry(self) -> None:
        """Let the process run all the time until its job is done: the rank waits for it."""
        self._hurry.set()

    def _pace(self) -> None:
        """Stop the process most of the time until its job is done or hurried."""
        process = self._process.pid
        assert process is not None
        try:
            while not self._pipe.poll(RUN_S) and not self._hurry.is_set():
                os.kill(process, signal.SIGSTOP)
                self._hurry.wait(TURN_S - RUN_S)
                os.kill(process, signal.SIGCONT)
        except ProcessLookupError:
            pass  # it has ended: reading from it says so

    def close(self) -> None:
        """End the process."""
        self.hurry()
        self._pipe.close()
        self._process.join(CLOSE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def has_spare_cores() -> bool:
    """Return whether each rank of this host has a core besides those that it computes with.

    On a GPU these are not those of its threads, which by default are all cores of the host.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    busy = BUSY_ON_GPU if torch.cuda.is_available() else torch.get_num_threads()
    return usable_cores() >= ranks * (busy + 1)


def _serve(parent: int, pipe: Connection, other_end: Connection) -> None:
    """Do jobs until the rank closes the pipe."""
    leave_group()
    end_with_parent()
    if os.getppid() != parent:  # ended before
        os._exit(1)
    other_end.close()
    os.nice(NICE)
    torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
    # Nor does CUDA, which torch would ask about every tensor if it was started before.
    torch.Tensor.is_pinned = _never_pinned  # type: ignore[method-assign,assignment]
    gc.freeze()  # a collection would write to, and so copy, all pages shared with the rank
    memory: SharedMemory | None = None
    while True:
        try:
            meeting, is_new, size_bytes, job = pipe.recv()
        except EOFError:
            os._exit(0)
        if is_new:
            memory = SharedMemory(size_bytes, reduction.recv_handle(pipe))
        assert memory is not None
        pipe.send(_outcome(job, memory, meeting))


def _never_pinned(_: torch.Tensor, *__: object) -> bool:
    """Answer for tensors in this process, which are in shared memory."""
    return False


def _outcome(job: Job, memory: SharedMemory, meeting: _Meeting | None) -> tuple[Any, Any]:
    """Return a job's result and its error, one of them None."""
    try:
        if meeting is not None:
            meeting.join()
        job.contents.restore(memory)
        return job(), None
    except (OSError, RunError, UserError) as error:  # of storage
        return None, error
    except Exception as error:
        logger.exception("writing a checkpoint failed")
        return None, RuntimeError(f"{type(error).__name__}: {error}")
