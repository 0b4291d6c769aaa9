"""Patches of megatron-core's behaviour that requires CUDA or NCCL.

Paths in docstrings are relative to ``megatron/core``.
"""

import inspect
from typing import Any

import torch
from megatron.core.models.common.embeddings import (
    rotary_pos_embedding,
    yarn_rotary_pos_embedding,
)
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer.moe import router, token_dispatcher

from moetron.moe.host.collectives import allow_uneven
from moetron.moe.host.context_parallel import own_chunks
from moetron.moe.host.patching import Patch
from moetron.moe.megatron.version_differences import present


def rotary_chunks() -> list[Patch]:
    """Shard rotary angles over context-parallel ranks without pinned memory.

    models/common/embeddings/rope_utils.py:62, called by rotary_pos_embedding.py:204 and
    yarn_rotary_pos_embedding.py:186.
    """
    name = "get_pos_emb_on_this_cp_rank"
    return [
        Patch(module, name, own_chunks)
        for module in (rotary_pos_embedding, yarn_rotary_pos_embedding)
    ]


def eager_router() -> list[Patch]:
    """Run the router's bias bookkeeping without ``torch.compile``, which needs a C++ compiler.

    transformer/moe/router.py:531, called in every forward pass.
    """
    compiled = router.TopKRouter._apply_expert_bias
    return [Patch(router.TopKRouter, "_apply_expert_bias", inspect.unwrap(compiled))]


def split_sizes() -> list[Patch]:
    """Pass split sizes to ``all_to_all_single`` as numbers, as on a GPU, not as a tensor.

    transformer/moe/moe_utils.py:1092 converts CUDA tensors only; used by
    transformer/moe/token_dispatcher.py:879 to 887.
    """

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return [Patch(token_dispatcher, "maybe_move_tensor_to_cpu", to_cpu)]


def uneven_gather() -> list[Patch]:
    """Gather unequal shapes, which gloo refuses: expert tensor parallelism with any routing.

    tensor_parallel/mappings.py:150, called by transformer/moe/token_dispatcher.py:663.
    """
    gather = mappings._gather_along_first_dim
    return [Patch(mappings, "_gather_along_first_dim", allow_uneven(gather))]


def pipeline_outputs() -> list[Patch]:
    """Keep a stage's output until its backward pass: gloo reads the buffer after isend returns.

    pipeline_parallel/schedules.py:154 frees it during an overlapped send of an interleaved
    pipeline, so the next stage would receive arbitrary memory; line 168 is the backward pass of a
    freed output.
    """

    def keep(out: Any, deallocate_pipeline_outputs: bool = False) -> None:
        pass

    def backward(output: torch.Tensor, grad_output: torch.Tensor | None) -> None:
        torch.autograd.backward(output, grad_output)

    return [
        Patch(schedules, "deallocate_output_tensor", keep),
        Patch(schedules, "custom_backward", backward),
    ]


def recomputed_storage() -> list[Patch]:
    """Restore a discarded output by a copy, not by an extension in C++.

    tensor_parallel/random.py:67 of 0.19 compiles one in the first backward pass: it needs a
    compiler, and a process that is killed meanwhile leaves a lock for which all later ones wait.
    """

    def copy_back(output: torch.Tensor, again: torch.Tensor) -> None:
        kept, source = output.untyped_storage(), again.untyped_storage()
        kept.resize_(source.size())
        kept.copy_(source)

    name = "_get_share_storage"
    return [Patch(parallel_random, name, lambda: copy_back) for _ in present(parallel_random, name)]


HOST_BEHAVIOUR = (
    rotary_chunks,
    eager_router,
    split_sizes,
    uneven_gather,
    pipeline_outputs,
    recomputed_storage,
)
"""Applied without CUDA."""
