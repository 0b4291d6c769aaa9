"""megatron-core's optimizer with our weight-decay rule and learning rates set from outside."""

from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from moetron.moe.config.bridge import optimizer_config
from moetron.moe.config.settings import Settings
from moetron.moe.training.model import ModelChunks
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
    for group in optimizer.param_groups:
        group["weight_decay"] = settings.optimizer.weight_decay * group["wd_mult"]
        if runtime.device.type == "cpu" and settings.optimizer.optimizer == "adam":
            # megatron-core names no implementation, and torch's default on a CPU is a loop of
            # small operations, several times slower.
            group["fused"] = True
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
