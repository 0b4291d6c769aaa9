"""Run a function on N processes and return the result of each rank.

Ranks are forked from a server that has imported torch and megatron-core once, so that a test pays
milliseconds instead of seconds for each rank. The function must be importable (module level of a
test file); its arguments travel by pickle, its result by ``torch.save`` (tensors, numbers, strings,
and dicts, lists and tuples of them).
"""

import io
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils

from moetron.moe.host.adapt import adapt_host, restore_host
from moetron.moe.host.device import backend_for
from moetron.moe.routing.losses import forget_auxiliary_losses

NVTE_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")

# A query for GPUs must not initialise CUDA in the server: its forks could not use it then.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pytest",
        "moetron.moe",  # before megatron-core
        "megatron.core.dist_checkpointing",
        "megatron.core.optimizer",
        "megatron.core.pipeline_parallel.schedules",
        "moetron.data.stream.mock_stream",
        "moetron.moe.training.build_trainer",
    ]
)


class RankFailed(RuntimeError):
    """A rank raised, died or exceeded the timeout; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` processes with gloo; return results in rank order.

    Every rank has one thread and a default process group (rank and size from
    ``torch.distributed``); the function itself sets up host adaptation and megatron's parallel
    state.

    Raises:
        RankFailed: with the first failing rank's traceback, or the ranks still running after
            ``timeout_s``. No process is left running.
    """
    (results,) = run_each(function, world_size, [args], timeout_s)
    return results


def run_each(
    function: Callable[..., Any],
    world_size: int,
    calls: Sequence[tuple[Any, ...]],
    timeout_s: float = 120,
    device: str = "cpu",
) -> Iterator[list[Any]]:
    """Run `run_ranks` for every ``args`` of ``calls``, sequentially on the same processes.

    Each call has new process groups. ``device`` "cuda" gives every rank a GPU, and NCCL.

    Raises:
        RankFailed: of the current call; later calls are not made. ``timeout_s`` is
            that of one call.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main,
                args=(sender, function, rank, world_size, calls, folder, timeout_s, device),
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            for _ in calls:
                yield _collect(pipes, processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


@contextmanager
def model_parallel(seed: int = 1234, **sizes: int | None) -> Iterator[None]:
    """Set up megatron's parallel state and random states on an adapted host; tear down at the end.

    Without a process group (a unit test outside `run_ranks`) it makes one of a single rank.

    Args:
        seed: of ``model_parallel_cuda_manual_seed``.
        sizes: keywords of ``parallel_state.initialize_model_parallel``.
    """
    single = not torch.distributed.is_initialized()
    adapt_host()
    if single:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    parallel_state.initialize_model_parallel(**sizes)
    # Process-wide; a backward pass without a schedule leaves one of another shape.
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    forget_auxiliary_losses()  # of another model's layers
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if single:
            torch.distributed.destroy_process_group()
            restore_host()


def _collect(
    pipes: list[Connection], processes: Sequence[BaseProcess], deadline: float
) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailed(f"ranks {late} still running at the timeout")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            results[rank] = _receive(pipes[rank], processes[rank], rank)
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection, process: BaseProcess, rank: int) -> Any:
    try:
        payload = pipe.recv_bytes()
    except EOFError:
        process.join(5)
        raise RankFailed(f"rank {rank} died with exit code {process.exitcode}") from None
    message = torch.load(io.BytesIO(payload), weights_only=True)
    if "error" in message:
        raise RankFailed(f"rank {rank} raised:\n{message['error']}")
    return message["result"]


def _rank_main(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    calls: Sequence[tuple[Any, ...]],
    folder: str,
    timeout_s: float,
    device: str,
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo"
    )
    warnings.filterwarnings("ignore", category=FutureWarning)  # megatron-core's use of torch
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    for number, args in enumerate(calls):
        for name in NVTE_SWITCHES:  # of the previous call: megatron-core sets them permanently
            os.environ.pop(name, None)
        try:
            torch.distributed.init_process_group(
                backend_for(torch.device(device)),
                init_method=f"file://{Path(folder) / str(number)}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s + 30),  # the parent's timeout comes first
            )
            with patch.dict(os.environ):  # megatron-core writes NVTE_*, which the next call rejects
                message = {"result": function(*args)}
            torch.distributed.barrier()
            parallel_state.destroy_model_parallel()
            forget_auxiliary_losses()  # of another model's layers
            torch.distributed.destroy_process_group()
        except BaseException:
            message = {"error": traceback.format_exc()}
        buffer = io.BytesIO()
        torch.save(message, buffer)
        pipe.send_bytes(buffer.getvalue())
    pipe.close()
