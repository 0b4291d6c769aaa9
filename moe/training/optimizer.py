"""megatron-core's optimizer with our parameter groups, and two optimizers that it does not know."""

from collections.abc import Sequence

import torch
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from moetron.moe.checkpoint.optimizer_state import leaves, mains
from moetron.moe.config.bridge import optimizer_config
from moetron.moe.config.schema.run import OptimizerSettings
from moetron.moe.config.schema.settings import Settings
from moetron.moe.optim.adafactor import Adafactor
from moetron.moe.optim.muon import Muon, MuonRule
from moetron.moe.optim.tensor_shards import cut_of
from moetron.moe.training.model_chunks import ModelChunks
from moetron.moe.training.runtime import Runtime


def build_optimizer(settings: Settings, chunks: ModelChunks, runtime: Runtime) -> MegatronOptimizer:
    """Optimizer of this rank's chunks: one for dense parameters, one for experts, chained."""
    chosen = settings.optimizer
    optimizer = get_megatron_optimizer(
        optimizer_config(settings),
        chunks,
        config_overrides=group_overrides(settings),
        use_gloo_process_groups=False,
        pg_collection=runtime.groups,
    )
    matrices = {id(parameter) for parameter in _matrices(chunks)}
    for leaf in leaves(optimizer):
        pairs = [(parameter, main) for parameter, main, _ in mains(leaf)]
        cuts = {main: cut_of(parameter, runtime.groups) for parameter, main in pairs}
        # `optimizer_config` has SGD hold the place of what megatron-core does not know.
        if chosen.optimizer == "adafactor":
            leaf.optimizer = Adafactor(
                leaf.optimizer.param_groups,
                {main: cut for main, cut in cuts.items() if cut is not None},
                chosen.adafactor_decay_rate,
                chosen.adafactor_clip_threshold,
                chosen.adafactor_min_dim_size_to_factor,
            )
        elif chosen.optimizer == "muon":
            moved = {main: cuts[main] for parameter, main in pairs if id(parameter) in matrices}
            leaf.optimizer = Muon(
                leaf.optimizer.param_groups,
                moved,
                MuonRule(
                    chosen.muon_momentum,
                    chosen.muon_num_ns_steps,
                    chosen.muon_extra_scale_factor,
                ),
                betas=(chosen.adam_beta1, chosen.adam_beta2),
                eps=chosen.adam_eps,
            )
    for group in optimizer.param_groups:
        group["weight_decay"] = chosen.weight_decay * group["wd_mult"]
        if runtime.device.type == "cpu" and chosen.optimizer in ("adam", "muon"):
            # megatron-core names no implementation, and torch's default on a CPU is a loop of
            # small operations, several times slower.
            group["fused"] = True
    return optimizer


def group_overrides(settings: Settings) -> dict[ParamKey, ParamGroupOverride]:
    """What parameter groups have of their own: multipliers of learning rate and weight decay.

    Without --decay-norms-and-biases megatron-core's rule spares biases and one-dimensional
    parameters, those of experts too.
    """
    chosen = settings.optimizer
    spares = not chosen.decay_norms_and_biases
    found = get_standard_config_overrides(optimizer_config(settings)) if spares else {}
    for part, lr_mult, wd_mult in _multipliers(chosen):
        if lr_mult != 1:
            found[_key("lr", part, spares=False)] = ParamGroupOverride(lr_mult=lr_mult)
        if wd_mult != 1:
            found[_key("wd", part, spares)] = ParamGroupOverride(wd_mult=wd_mult)
    return found


def _multipliers(chosen: OptimizerSettings) -> Sequence[tuple[str, float, float]]:
    """(part of a parameter's name, multiplier of its learning rate, of its weight decay)."""
    return [
        (".router.", chosen.router_lr_mult, chosen.router_wd_mult),
        (".experts.", chosen.expert_lr_mult, chosen.expert_wd_mult),  # shared: ".shared_experts."
    ]


def _key(label: str, part: str, spares: bool) -> ParamKey:
    """Parameters with ``part`` in their names, without those that decay spares if it ``spares``.

    Keys are equal where ``label`` and ``part`` are: megatron-core compares predicates by name.
    """

    def matches(parameter: torch.nn.Parameter, name: str) -> bool:
        is_spared = spares and (parameter.dim() == 1 or name.endswith(".bias"))
        return part in name and not is_spared

    predicate = ParamWithNamePredicate(name=f"{label} of {part}", fn=matches)
    return ParamKey(with_name_predicate=predicate)


def _matrices(chunks: ModelChunks) -> list[torch.nn.Parameter]:
    """What Muon moves: hidden matrices, experts' in stacks, the router's; not the vocabulary's.

    The last stage's copy of the embedding, for multi-token prediction, is only marked as shared.
    """
    return [
        parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if parameter.dim() >= 2
        and min(parameter.shape[-2:]) > 1
        and not getattr(parameter, "is_embedding_or_output_parameter", False)
        and not getattr(parameter, "shared_embedding", False)
        and not name.endswith(".inner_scale")  # one vector for each expert
    ]


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step, times the multiplier of each group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]
