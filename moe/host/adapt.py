"""Let unmodified megatron-core 0.16.1 run on CPU and gloo.

`adapt_host` is called once by the entry point, before any process group or model is made. Importing
this module changes nothing, and where CUDA is present `adapt_host` does nothing.

Each adaptation is a function that returns patches and whose docstring names the lines of
megatron-core (paths below ``megatron/core``) that need it. Functions of ``torch.cuda`` are replaced
only where megatron-core calls them from dozens of places; without CUDA each of them raises, so that
nothing that worked changes its meaning. Everything else is patched in megatron-core itself.
"""

import inspect
import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
from megatron.core import utils as core_utils
from megatron.core.dist_checkpointing import exchange_utils
from megatron.core.dist_checkpointing.strategies import state_dict_saver
from megatron.core.models.common.embeddings import (
    rotary_pos_embedding,
    yarn_rotary_pos_embedding,
)
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import data as parallel_data
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer import utils as transformer_utils
from megatron.core.transformer.moe import moe_utils, router, token_dispatcher
from torch.distributed import ProcessGroup

from moetron.moe.host import streams
from moetron.moe.host.collectives import allow_uneven
from moetron.moe.host.patching import Patch, with_constants

Adaptation = Callable[[], list[Patch]]

_TO_CPU = {"cuda": "cpu"}
_FLOAT_NAMES = {"torch.cuda.FloatTensor": "torch.FloatTensor"}
_HALF_NAMES = {
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def current_device() -> list[Patch]:
    """``torch.cuda.current_device()`` is the default device: the CPU, or meta inside its context.

    Needed by about 60 factories, among them tensor_parallel/layers.py:261, mappings.py:148,
    transformer/moe/router.py:169, models/common/embeddings/rotary_pos_embedding.py:162.
    """
    return [Patch(torch.cuda, "current_device", torch.get_default_device)]


def tensor_cuda() -> list[Patch]:
    """``Tensor.cuda()`` keeps the tensor where it is.

    Needed by tensor_parallel/data.py:84, utils.py:898,
    models/common/language_module/language_module.py:244, dist_checkpointing/exchange_utils.py:336
    and 499, optimizer/optimizer.py:375.
    """

    def cuda(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    return [Patch(torch.Tensor, "cuda", cuda)]


def cuda_streams() -> list[Patch]:
    """Streams and events whose work is done when asked.

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


def random_states() -> list[Patch]:
    """The "CUDA" generator is the host's; its change inside a fork is no reason for a warning.

    Needed by tensor_parallel/random.py:235 to 238 and 422 (seeding), 55 and 107 (states) and 262
    (the warning). Ranks are processes, so that states remain distinct over ranks.
    """

    def not_about_the_host(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.msg

    logger = logging.getLogger(parallel_random.__name__)
    return [
        Patch(torch.cuda, "manual_seed", streams.manual_seed),
        Patch(torch.cuda, "get_rng_state", streams.get_rng_state),
        Patch(torch.cuda, "set_rng_state", streams.set_rng_state),
        Patch(parallel_random, "_get_cuda_rng_state", streams.get_rng_state),
        Patch(parallel_random, "_set_cuda_rng_state", streams.set_rng_state),
        Patch(logger, "filters", [*logger.filters, not_about_the_host]),
    ]


def rotary_chunks() -> list[Patch]:
    """Cut rotary angles over context-parallel ranks without pinned memory.

    models/common/embeddings/rope_utils.py:62, called by rotary_pos_embedding.py:204 and
    yarn_rotary_pos_embedding.py:186.
    """

    def cut(angles: torch.Tensor, seq_dim: int, cp_group: ProcessGroup) -> torch.Tensor:
        batch = {"angles": angles.movedim(seq_dim, 1)}
        held: torch.Tensor = core_utils.get_batch_on_this_cp_rank(batch, cp_group)["angles"]
        return held.movedim(1, seq_dim)

    name = "get_pos_emb_on_this_cp_rank"
    return [
        Patch(module, name, cut) for module in (rotary_pos_embedding, yarn_rotary_pos_embedding)
    ]


def latent_attention() -> list[Patch]:
    """Build latent attention without asking for Transformer Engine's classes.

    transformer/multi_latent_attention.py:184 calls ``isinstance`` with a mock that the import in
    line 54 takes for a class (a bug of 0.16.1).
    """
    present = isinstance(multi_latent_attention.TELinear, type)
    return [] if present else [Patch(multi_latent_attention, "HAVE_TE", False)]


def router_gemm() -> list[Patch]:
    """Define the Transformer Engine GEMM that the router asks for as absent.

    transformer/moe/moe_utils.py:1192 and 1225 read ``te_general_gemm``, which the failed import in
    line 24 leaves undefined (a bug of 0.16.1, on GPUs too).
    """
    return (
        [] if hasattr(moe_utils, "te_general_gemm") else [Patch(moe_utils, "te_general_gemm", None)]
    )


def eager_router() -> list[Patch]:
    """Run the router's bias bookkeeping without ``torch.compile``, which needs a C++ compiler.

    transformer/moe/router.py:531, called in every forward pass.
    """
    compiled = router.TopKRouter._apply_expert_bias
    return [Patch(router.TopKRouter, "_apply_expert_bias", inspect.unwrap(compiled))]


def discarded_outputs() -> list[Patch]:
    """Recompute norms (--recompute-modules layernorm) without asking Transformer Engine for FP8.

    tensor_parallel/random.py:637 takes its own default, ``fp8=False``, for FP8, since it is not
    None; called so by transformer/transformer_layer.py:577 and 672.
    """
    made = parallel_random.CheckpointWithoutOutput.__init__
    return [Patch(made, "__defaults__", (None,))]


def split_sizes() -> list[Patch]:
    """Hand split sizes to ``all_to_all_single`` as numbers, as on a GPU, instead of a tensor.

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


def schedule_scalars() -> list[Patch]:
    """Token counters of the schedules: pipeline_parallel/schedules.py:596, 983, 2138."""
    return [
        with_constants(schedules.forward_backward_no_pipelining, _TO_CPU),
        with_constants(schedules.forward_backward_pipelining_with_interleaving, _TO_CPU),
        with_constants(schedules.forward_backward_pipelining_without_interleaving, _TO_CPU),
    ]


def pipeline_outputs() -> list[Patch]:
    """Keep a stage's output until its backward pass: gloo reads what it sends after isend returns.

    pipeline_parallel/schedules.py:154 frees it as soon as an overlapped send of an interleaved
    pipeline is under way, so that the next stage would receive whatever memory holds by then;
    line 168, the backward pass of a freed output, goes with it.
    """

    def keep(out: Any, deallocate_pipeline_outputs: bool = False) -> None:
        pass

    def backward(output: torch.Tensor, grad_output: torch.Tensor | None) -> None:
        torch.autograd.backward(output, grad_output)

    return [
        Patch(schedules, "deallocate_output_tensor", keep),
        Patch(schedules, "custom_backward", backward),
    ]


def optimizer_scalars() -> list[Patch]:
    """Scalars of optimizer steps.

    optimizer/optimizer.py:473 to 485 and 907, optimizer/clip_grads.py:90 to 115, 174 and 207,
    utils.py:1207.
    """
    return [
        with_constants(optimizer.MixedPrecisionOptimizer.__init__, _TO_CPU),
        with_constants(optimizer.FP32Optimizer.__init__, _TO_CPU),
        with_constants(clip_grads.get_grad_norm_fp32, _TO_CPU),
        with_constants(clip_grads.clip_grad_by_total_norm_fp32, {**_TO_CPU, **_FLOAT_NAMES}),
        with_constants(clip_grads.count_zeros_fp32, _TO_CPU),
        with_constants(core_utils.local_multi_tensor_l2_norm, _TO_CPU),
    ]


def parameter_types() -> list[Patch]:
    """Names of parameter types.

    optimizer/optimizer.py:671 and 690, optimizer/distrib_optimizer.py:361, 420 and 582.
    """
    distributed = distrib_optimizer.DistributedOptimizer
    names = {**_FLOAT_NAMES, **_HALF_NAMES}
    return [
        with_constants(optimizer.Float16OptimizerWithFloat16Params.__init__, names),
        with_constants(distributed._build_model_and_main_param_groups, names),
        with_constants(distributed.__init__, _HALF_NAMES),
    ]


def causal_masks() -> list[Patch]:
    """Masks of the unfused attention: transformer/utils.py:35 and 40."""
    return [
        with_constants(transformer_utils.get_default_causal_mask, _TO_CPU),
        with_constants(transformer_utils.get_sliding_window_causal_mask, _TO_CPU),
    ]


def loss_tracker() -> list[Patch]:
    """Auxiliary losses of a rank without experts: transformer/moe/moe_utils.py:998."""
    return [with_constants(moe_utils.track_moe_metrics, _TO_CPU)]


def broadcast_sizes() -> list[Patch]:
    """Sizes of a broadcast batch: tensor_parallel/data.py:37."""
    return [with_constants(parallel_data._build_key_size_numel_dictionaries, _TO_CPU)]


def checkpoint_exchange() -> list[Patch]:
    """Buffers of checkpoint loading and planning.

    dist_checkpointing/exchange_utils.py:98 to 110 and 326,
    dist_checkpointing/strategies/state_dict_saver.py:204.
    """
    return [
        with_constants(exchange_utils._get_empty_tensor_for_exchange, _TO_CPU),
        with_constants(exchange_utils.exchange_loaded_tensors_gather_rounds, _TO_CPU),
        with_constants(state_dict_saver.verify_global_md_reuse, _TO_CPU),
    ]


ADAPTATIONS: dict[str, Adaptation] = {
    adaptation.__name__: adaptation
    for adaptation in (
        current_device,
        tensor_cuda,
        cuda_streams,
        random_states,
        rotary_chunks,
        latent_attention,
        router_gemm,
        eager_router,
        discarded_outputs,
        split_sizes,
        uneven_gather,
        schedule_scalars,
        pipeline_outputs,
        optimizer_scalars,
        parameter_types,
        causal_masks,
        loss_tracker,
        broadcast_sizes,
        checkpoint_exchange,
    )
}

_undo: dict[str, list[Patch]] = {}


def adapt_host(skip: Collection[str] = ()) -> None:
    """Apply every adaptation that is not yet applied; nothing where CUDA is present.

    Args:
        skip: names in `ADAPTATIONS` to leave out (tests show what breaks without each).
    """
    if torch.cuda.is_available():
        return
    for name, adaptation in ADAPTATIONS.items():
        if name not in skip and name not in _undo:
            _undo[name] = [patch.apply() for patch in adaptation()]


def restore_host(names: Collection[str] = tuple(ADAPTATIONS)) -> None:
    """Undo adaptations (all of them unless named)."""
    for name in names:
        for patch in reversed(_undo.pop(name, [])):
            patch.apply()
