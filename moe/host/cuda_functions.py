"""Replacements of ``torch.cuda`` functions that megatron-core calls without CUDA.

Only functions with dozens of callers are replaced. Without CUDA each of them raises, so no working
code changes behaviour. Paths in docstrings are relative to ``megatron/core``.
"""

import logging
from typing import Any

import torch
from megatron.core.tensor_parallel import random as parallel_random

from moetron.moe.host import streams
from moetron.moe.host.patching import Patch


def current_device() -> list[Patch]:
    """Make ``torch.cuda.current_device()`` the default device: CPU, or meta in its context.

    Needed by about 60 factories, among them tensor_parallel/layers.py:261, mappings.py:148,
    transformer/moe/router.py:169, models/common/embeddings/rotary_pos_embedding.py:162.
    """
    return [Patch(torch.cuda, "current_device", torch.get_default_device)]


def tensor_cuda() -> list[Patch]:
    """Make ``Tensor.cuda()`` return the tensor itself.

    Needed by tensor_parallel/data.py:84, utils.py:898,
    models/common/language_module/language_module.py:244, dist_checkpointing/exchange_utils.py:336
    and 499, optimizer/optimizer.py:375.
    """

    def cuda(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    return [Patch(torch.Tensor, "cuda", cuda)]


def cuda_streams() -> list[Patch]:
    """Replace streams and events by synchronous ones.

    Needed by transformer/moe/token_dispatcher.py:445 and 871 to 897 (whose copy stream must differ
    from the current stream), transformer/moe/shared_experts.py:123, parallel_state.py:933,
    pipeline_parallel/p2p_communication.py:398, timers.py:152,
    distributed/distributed_data_parallel.py:230, distributed/param_and_grad_buffer.py:417 and 529,
    dist_checkpointing/strategies/filesystem_async.py:230.
    """
    return [
        Patch(torch.cuda, "Stream", streams.HostStream),
        Patch(torch.cuda, "Event", streams.HostEvent),
        Patch(torch.cuda, "current_stream", streams.main_stream),
        Patch(torch.cuda, "default_stream", streams.main_stream),
        Patch(torch.cuda, "stream", streams.on_stream),
        Patch(torch.cuda, "synchronize", streams.synchronize),
    ]


def combined_schedule() -> list[Patch]:
    """Ignore ranges of NVTX and streams of tensors (--overlap-moe-expert-parallel-comm).

    Needed by pipeline_parallel/utils.py:190 to 270 and
    models/common/model_chunk_schedule_plan.py:520 to 560.
    """

    def ignore(*_: Any, **__: Any) -> None:
        pass

    return [
        Patch(torch.Tensor, "record_stream", ignore),
        Patch(torch.cuda.nvtx, "range_push", ignore),
        Patch(torch.cuda.nvtx, "range_pop", ignore),
        Patch(torch.cuda.nvtx, "range", streams.on_stream),
    ]


def random_states() -> list[Patch]:
    """Use the CPU's generator as the "CUDA" generator, without a warning on changes in a fork.

    Needed by tensor_parallel/random.py:235 to 238 and 422 (seeding), 55 and 107 (states) and 262
    (the warning). Ranks are processes, so states remain distinct over ranks.
    """

    def is_unexpected(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.msg

    logger = logging.getLogger(parallel_random.__name__)
    return [
        Patch(torch.cuda, "manual_seed", streams.manual_seed),
        Patch(torch.cuda, "get_rng_state", streams.get_rng_state),
        Patch(torch.cuda, "set_rng_state", streams.set_rng_state),
        Patch(parallel_random, "_get_cuda_rng_state", streams.get_rng_state),
        Patch(parallel_random, "_set_cuda_rng_state", streams.set_rng_state),
        Patch(logger, "filters", [*logger.filters, is_unexpected]),
    ]


CUDA_FUNCTIONS = (
    current_device,
    tensor_cuda,
    cuda_streams,
    combined_schedule,
    random_states,
)
"""Applied without CUDA."""
