"""Map over a Ray cluster, results in order, memory bounded: a distributed ``ordered_map``."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from typing import Any, TypeVar

from moetron.common.errors import UserError
from moetron.common.packages import installed_version

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3
"""Tasks of usual weight, per core of the cluster, read ahead of their results."""
MAX_RETRIES = 10
"""Retries of a task whose worker or node dies."""


def ray_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    weigh: Callable[[Item], float] = lambda item: 1.0,
) -> Iterator[Result]:
    """Map over the Ray cluster that RAY_ADDRESS names, else over ``workers`` local cores.

    This process reads and writes; texts and results use Ray's object store. Moetron and the
    tokenizer's file must be on every node. The task of a worker that dies is retried; after
    ``MAX_RETRIES`` deaths BrokenExecutor is raised.
    """
    import ray

    if not ray.is_initialized():
        cores = None if "RAY_ADDRESS" in os.environ else workers
        ray.init(num_cpus=cores, log_to_driver=False, include_dashboard=False)
    task: Any = ray.remote(max_retries=MAX_RETRIES, num_cpus=1)(_call)
    shared = ray.put(function)
    waiting: deque[tuple[float, Any]] = deque()
    load, capacity = 0.0, AHEAD * ray.cluster_resources().get("CPU", 1)
    try:
        for item in items:
            weight = weigh(item)
            while waiting and load + weight > capacity:
                load -= waiting[0][0]
                yield ray.get(waiting.popleft()[1])
            waiting.append((weight, task.remote(shared, item)))
            load += weight
            del item  # free the memory of heavy tasks
        while waiting:
            yield ray.get(waiting.popleft()[1])
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError) as error:
        raise BrokenExecutor(str(error)) from None


def require_ray() -> None:
    """Raise UserError if Ray is not installed."""
    if installed_version("ray") is None:
        raise UserError("--engine ray: needs the package ray; pip install 'moetron[ray]'")


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    """Run one task."""
    return function(item)
