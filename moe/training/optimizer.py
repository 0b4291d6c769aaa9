"""megatron-core's optimizer with our weight-decay rule and learning rates set from outside."""

import torch
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.moe.config.bridge import optimizer_config
from moetron.moe.config.settings import Settings
from moetron.moe.training.adafactor import Adafactor, Cut
from moetron.moe.training.model import ModelChunks
from moetron.moe.training.optimizer_state import leaves, mains
from moetron.moe.training.runtime import Runtime


def build_optimizer(settings: Settings, chunks: ModelChunks, runtime: Runtime) -> MegatronOptimizer:
    """Optimizer of this rank's chunks: one for dense parameters, one for experts, chained.

    An empty dictionary of overrides decays every parameter; ``None`` means megatron-core's rule,
    which spares biases and one-dimensional parameters.
    """
    optimizer = get_megatron_optimizer(
        optimizer_config(settings),
        chunks,
        config_overrides={} if settings.optimizer.decay_norms_and_biases else None,
        use_gloo_process_groups=False,
        pg_collection=runtime.groups,
    )
    if settings.optimizer.optimizer == "adafactor":
        _step_with_adafactor(optimizer, settings, runtime.groups)
    for group in optimizer.param_groups:
        group["weight_decay"] = settings.optimizer.weight_decay * group["wd_mult"]
        if runtime.device.type == "cpu" and settings.optimizer.optimizer == "adam":
            # megatron-core names no implementation, and torch's default on a CPU is a loop of
            # small operations, several times slower.
            group["fused"] = True
    return optimizer


def _step_with_adafactor(
    optimizer: MegatronOptimizer, settings: Settings, groups: ProcessGroupCollection
) -> None:
    """Let Adafactor take the place of the SGD that `optimizer_config` asks for."""
    chosen = settings.optimizer
    for leaf in leaves(optimizer):
        found = {main: _cut(parameter, groups) for parameter, main, _ in mains(leaf)}
        leaf.optimizer = Adafactor(
            leaf.optimizer.param_groups,
            {main: cut for main, cut in found.items() if cut is not None},
            chosen.adafactor_decay_rate,
            chosen.adafactor_clip_threshold,
            chosen.adafactor_min_dim_size_to_factor,
        )


def _cut(parameter: torch.Tensor, groups: ProcessGroupCollection) -> Cut | None:
    """How tensor ranks (of experts: theirs) share a parameter; None: it is whole."""
    is_expert = not getattr(parameter, "allreduce", True)
    group = groups.expt_tp if is_expert else groups.tp
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return None
    return Cut(parameter.partition_dim - parameter.dim(), group)  # type: ignore[attr-defined]


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
