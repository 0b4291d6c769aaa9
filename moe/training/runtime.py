"""Set-up of a rank: process groups, device, threads and seeds."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.common.errors import UserError
from moetron.common.threads import use_threads
from moetron.common.watch import activity
from moetron.common.watch.listeners import reachable
from moetron.moe.checkpoint.random_states import seed_generators
from moetron.moe.checkpoint.writer.writer_process import WriterProcess
from moetron.moe.config.schema.pipeline_split import virtual_pipeline_size
from moetron.moe.config.schema.settings import Settings
from moetron.moe.host.adapt import adapt_host
from moetron.moe.host.allocator import keep_freed_memory
from moetron.moe.host.determinism import deterministic
from moetron.moe.host.device import backend_for, prepare_device
from moetron.moe.monitoring.watchdog import Watchdog, record_collectives
from moetron.moe.overlap.tensor_buffers import communication_buffers

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Runtime:
    """A rank's position among the others."""

    rank: int
    world_size: int
    device: torch.device
    groups: ProcessGroupCollection
    writer: WriterProcess | None = None
    """Process for ``--async-save``."""

    @property
    def dp_rank(self) -> int:
        """Rank in the data-parallel group."""
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        """Size of the data-parallel group, over which a global batch is split."""
        return self.groups.dp.size()

    @property
    def holds_loss(self) -> bool:
        """Return whether this rank reports the loss: tensor rank 0 of the last stage."""
        last_stage = self.groups.pp.rank() == self.groups.pp.size() - 1
        return last_stage and self.groups.tp.rank() == 0

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes metrics and prints."""
        return self.rank == 0


@contextmanager
def running(settings: Settings) -> Iterator[Runtime]:
    """Set up process groups and seeds, and destroy the groups at the end.

    Ranks come from torchrun's environment; without one there is a single rank.

    Raises:
        UserError: the requested device or layers cannot be used; the port of the rendezvous is
            taken.
    """
    activity.begin(activity.START, 0)
    with (
        checkpoint_writer(settings) as writer,  # forked before threads and CUDA
        deterministic(settings.training.deterministic_mode),
        watched(settings) as watchdog,
    ):
        device = prepare_device(settings)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            record_collectives()
        else:
            keep_freed_memory()
        use_threads(settings.parallel.cpu_threads)
        _join(settings, backend_for(device))
        watchdog.attach(torch.distributed.distributed_c10d._get_default_store())
        try:
            runtime = replace(divide(settings, device), writer=writer)
            if writer is not None:
                writer.meet(_timeout(settings))
            with communication_buffers(settings):
                yield runtime
        except BaseException:
            # With several ranks, destroying groups may wait for a dead one; the process ends.
            if torch.distributed.get_world_size() == 1:
                _leave()
            raise
        activity.begin(activity.END, activity.current().step)
        watchdog.close()
        _leave()


@contextmanager
def checkpoint_writer(settings: Settings) -> Iterator[WriterProcess | None]:
    """Run the process that ``--async-save`` needs."""
    if settings.checkpoint.save is None or not settings.checkpoint.async_save:
        yield None
        return
    writer = WriterProcess()
    try:
        yield writer
    finally:
        writer.close()


@contextmanager
def watched(settings: Settings) -> Iterator[Watchdog]:
    """Watch over this rank's main thread."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    watchdog = Watchdog(settings, rank, world_size)
    try:
        yield watchdog
    finally:
        watchdog.close()


def _leave() -> None:
    """Destroy all process groups."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def divide(settings: Settings, device: torch.device) -> Runtime:
    """Create Megatron's groups in its order tp-cp-ep-dp-pp, and seed every generator."""
    adapt_host()
    parallel = settings.parallel
    # Dense layers: world = TP x CP x DP x PP. Expert layers: world = ETP x EP x expert DP x PP, so
    # that experts are spread over ranks that are data-parallel (and tensor-parallel) elsewhere.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(settings),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(parallel.distributed_timeout_minutes)),
        create_gloo_process_groups=False,
    )
    captures = settings.performance.cuda_graph_impl != "none"
    seed_generators(settings.training.seed, graph_safe=captures)
    return Runtime(
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        device,
        ProcessGroupCollection.use_mpu_process_groups(),
    )


def _join(settings: Settings, backend: str) -> None:
    """Start the default process group; a single rank needs no port."""
    timeout = _timeout(settings)
    if "RANK" not in os.environ:
        alone = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            backend, store=alone, rank=0, world_size=1, timeout=timeout
        )
        return
    try:
        # Rendezvous of all ranks at MASTER_ADDR:MASTER_PORT; the default group holds them all.
        place: dict[str, Any] = {}
        if (store := _loopback_store(timeout)) is not None:
            place = {"store": store, "rank": _number("RANK"), "world_size": _number("WORLD_SIZE")}
        else:
            _tell_if_reachable()
        torch.distributed.init_process_group(backend, timeout=timeout, **place)
    except (torch.distributed.DistNetworkError, OSError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE and "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')}: another program listens on this port; "
            "choose a free one (torchrun: --master-port)"
        ) from error


def _timeout(settings: Settings) -> timedelta:
    return timedelta(minutes=settings.parallel.distributed_timeout_minutes)


def _loopback_store(timeout: timedelta) -> torch.distributed.Store | None:
    """Return a store that listens on this host only, None for a rendezvous of several hosts.

    torch's own listens on all interfaces, also at the address 127.0.0.1 (TCPStore.cpp).
    """
    ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's
    if os.environ.get("MASTER_ADDR") != _LOOPBACK or not ours:
        return None
    port, ranks, listens = _number("MASTER_PORT"), _number("WORLD_SIZE"), _number("RANK") == 0
    if not listens:
        return torch.distributed.TCPStore(_LOOPBACK, port, ranks, timeout=timeout)
    server = socket.create_server((_LOOPBACK, port), backlog=max(128, ranks))
    return torch.distributed.TCPStore(
        _LOOPBACK, port, ranks, True, timeout, False, master_listen_fd=server.detach()
    )


def _tell_if_reachable() -> None:
    """Note that the rendezvous of a single host can be reached from others, as torchrun's can."""
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if alone and _number("RANK") == 0 and reachable(port := _number("MASTER_PORT")):
        print(
            f"note: torchrun's rendezvous (port {port}) listens on all interfaces and trusts every "
            "connection; `moetron launch` listens on this host alone",
            file=sys.stderr,
        )


def _number(name: str) -> int:
    return int(os.environ[name])
