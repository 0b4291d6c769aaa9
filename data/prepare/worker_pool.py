"""Map over processes or threads, results in order, memory bounded."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3
"""Tasks of usual weight, per worker, read ahead of their results."""


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    weigh: Callable[[Item], float] = lambda item: 1.0,
    threads: bool = False,
) -> Iterator[Result]:
    """Map over ``workers`` processes or ``threads`` (1: in this process).

    Waiting tasks weigh at most ``AHEAD * workers`` together, except for a single heavier one. A
    worker that dies raises BrokenProcessPool instead of hanging; workers end with this process,
    even if it is killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers) if threads else _processes(workers)
    waiting: deque[tuple[float, Future[Result]]] = deque()
    load = 0.0
    try:
        for item in items:
            weight = weigh(item)
            while waiting and load + weight > AHEAD * workers:
                load -= waiting[0][0]
                yield waiting.popleft()[1].result()
            waiting.append((weight, pool.submit(function, item)))
            load += weight
            del item  # free the memory of heavy tasks
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _processes(workers: int) -> Executor:
    """Return a pool of spawned processes, because a fork copies locks held by other threads."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this process when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
