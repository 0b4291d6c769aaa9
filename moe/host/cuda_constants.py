"""Patches that replace CUDA by the CPU in string constants of megatron-core's functions.

Paths in docstrings are relative to ``megatron/core``.
"""

from megatron.core import utils as core_utils
from megatron.core.dist_checkpointing import exchange_utils
from megatron.core.dist_checkpointing.strategies import state_dict_saver
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import data as parallel_data
from megatron.core.transformer import utils as transformer_utils

from moetron.moe.host.patching import Patch, with_constants
from moetron.moe.megatron.version_differences import present

_TO_CPU = {"cuda": "cpu"}
_FLOAT_NAMES = {"torch.cuda.FloatTensor": "torch.FloatTensor"}
_HALF_NAMES = {
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def schedule_scalars() -> list[Patch]:
    """Patch token counters of the schedules: pipeline_parallel/schedules.py:596, 983, 2138."""
    return [
        with_constants(schedules.forward_backward_no_pipelining, _TO_CPU),
        with_constants(schedules.forward_backward_pipelining_with_interleaving, _TO_CPU),
        with_constants(schedules.forward_backward_pipelining_without_interleaving, _TO_CPU),
    ]


def optimizer_scalars() -> list[Patch]:
    """Patch scalars of optimizer steps.

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
        *(
            with_constants(has_group, _TO_CPU)  # 0.19: optimizer/optimizer.py:315
            for has_group in present(optimizer.MegatronOptimizer, "has_grad_norm_group")
        ),
    ]


def parameter_types() -> list[Patch]:
    """Patch names of parameter types.

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
    """Patch masks of unfused attention: transformer/utils.py:35 and 40."""
    return [
        with_constants(transformer_utils.get_default_causal_mask, _TO_CPU),
        with_constants(transformer_utils.get_sliding_window_causal_mask, _TO_CPU),
    ]


def broadcast_sizes() -> list[Patch]:
    """Patch sizes of a broadcast batch: tensor_parallel/data.py:37."""
    return [with_constants(parallel_data._build_key_size_numel_dictionaries, _TO_CPU)]


def checkpoint_exchange() -> list[Patch]:
    """Patch buffers of checkpoint loading and planning.

    dist_checkpointing/exchange_utils.py:98 to 110 and 326,
    dist_checkpointing/strategies/state_dict_saver.py:204.
    """
    return [
        with_constants(exchange_utils._get_empty_tensor_for_exchange, _TO_CPU),
        with_constants(exchange_utils.exchange_loaded_tensors_gather_rounds, _TO_CPU),
        with_constants(state_dict_saver.verify_global_md_reuse, _TO_CPU),
    ]


CUDA_CONSTANTS = (
    schedule_scalars,
    optimizer_scalars,
    parameter_types,
    causal_masks,
    broadcast_sizes,
    checkpoint_exchange,
)
"""Applied without CUDA."""
