"""megatron-core's optimizer with our parameter groups, and two optimizers that it lacks."""

from collections.abc import Mapping, Sequence

import torch
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from moetron.moe.checkpoint.optimizer_state import leaves, mains
from moetron.moe.config.bridge import optimizer_config
from moetron.moe.config.schema.run import OptimizerSettings
from moetron.moe.config.schema.settings import Settings
from moetron.moe.kernels.availability import uses_triton
from moetron.moe.optim.adafactor import Adafactor
from moetron.moe.optim.muon import Muon, MuonRule
from moetron.moe.optim.one_pass_adamw import OnePassAdamW
from moetron.moe.optim.tensor_shards import shard_of
from moetron.moe.training.model_chunks import ModelChunks
from moetron.moe.training.runtime import Runtime


def build_optimizer(settings: Settings, chunks: ModelChunks, runtime: Runtime) -> MegatronOptimizer:
    """Build the chained optimizers of this rank's dense and expert parameters."""
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
        shards = {main: shard_of(parameter, runtime.groups) for parameter, main in pairs}
        # `optimizer_config` names SGD as a placeholder for optimizers that megatron-core lacks.
        if chosen.optimizer == "adafactor":
            leaf.optimizer = Adafactor(
                leaf.optimizer.param_groups,
                {main: shard for main, shard in shards.items() if shard is not None},
                chosen.adafactor_decay_rate,
                chosen.adafactor_clip_threshold,
                chosen.adafactor_min_dim_size_to_factor,
            )
        elif chosen.optimizer == "muon":
            by_muon = {main: shards[main] for parameter, main in pairs if id(parameter) in matrices}
            leaf.optimizer = Muon(
                leaf.optimizer.param_groups,
                by_muon,
                MuonRule(
                    chosen.muon_momentum,
                    chosen.muon_num_ns_steps,
                    chosen.muon_extra_scale_factor,
                ),
                betas=(chosen.adam_beta1, chosen.adam_beta2),
                eps=chosen.adam_eps,
            )
        elif chosen.optimizer == "adam" and _suits_one_pass(leaf):
            _use_one_pass(leaf, chosen)
            continue
        if isinstance(leaf.optimizer, torch.optim.AdamW):
            # megatron-core selects no implementation. torch's default is a loop of small operations
            # on a CPU and several passes over all states on a GPU. Transformer Engine's and apex's
            # AdamW are other classes, with one pass.
            for group in leaf.optimizer.param_groups:
                group["fused"] = True
    for group in optimizer.param_groups:
        group["weight_decay"] = chosen.weight_decay * group["wd_mult"]
    return optimizer


def _suits_one_pass(leaf: MegatronOptimizer) -> bool:
    """Return whether `OnePassAdamW` can replace the AdamW of torch, Transformer Engine or apex."""
    known = type(leaf.optimizer).__name__ in ("AdamW", "FusedAdam")  # not on the host, for example
    found = [main for _, main, _ in mains(leaf)]
    return (
        known
        and not leaf.config.use_precision_aware_optimizer
        and all(
            main.dtype == torch.float32
            and main.is_contiguous()
            and main.is_leaf  # not so the shards of an fp32 model's distributed optimizer
            and uses_triton(main)
            for main in found
        )
    )


def _use_one_pass(leaf: MegatronOptimizer, chosen: OptimizerSettings) -> None:
    """Let `OnePassAdamW` update parameters, and those of the model too where it holds all of them.

    The distributed optimizer copies its shards itself. Quantised parameters are no plain tensors.
    """
    copies = {}
    if isinstance(leaf, Float16OptimizerWithFloat16Params):
        copies = {main: model for model, main, _ in mains(leaf) if main is not model}
        if not all(type(model.data) is torch.Tensor for model in copies.values()):
            copies = {}
    inner = leaf.optimizer = OnePassAdamW(
        leaf.optimizer.param_groups,
        copies,
        betas=(chosen.adam_beta1, chosen.adam_beta2),
        eps=chosen.adam_eps,
    )
    if not copies:
        return
    copy = leaf._copy_main_params_to_model_params

    def copy_unless_done() -> None:
        if not inner.copied:  # after a load
            copy()
        inner.copied = False

    leaf._copy_main_params_to_model_params = copy_unless_done


def group_overrides(settings: Settings) -> dict[ParamKey, ParamGroupOverride]:
    """Return the multipliers of learning rate and weight decay per parameter group.

    Without --decay-norms-and-biases megatron-core's rule exempts biases and one-dimensional
    parameters from decay, also those of experts.
    """
    chosen = settings.optimizer
    exempts = not chosen.decay_norms_and_biases
    found = get_standard_config_overrides(optimizer_config(settings)) if exempts else {}
    for part, lr_mult, wd_mult in _multipliers(chosen):
        if lr_mult != 1:
            found[_key("lr", part, exempts=False)] = ParamGroupOverride(lr_mult=lr_mult)
        if wd_mult != 1:
            found[_key("wd", part, exempts)] = ParamGroupOverride(wd_mult=wd_mult)
    return found


def _multipliers(chosen: OptimizerSettings) -> Sequence[tuple[str, float, float]]:
    """Return (part of a parameter's name, its learning-rate and weight-decay multipliers)."""
    return [
        (".router.", chosen.router_lr_mult, chosen.router_wd_mult),
        (".experts.", chosen.expert_lr_mult, chosen.expert_wd_mult),  # shared: ".shared_experts."
    ]


def _key(label: str, part: str, exempts: bool) -> ParamKey:
    """Return the key of parameters with ``part`` in their names.

    ``exempts``: without biases and one-dimensional parameters. Keys with equal ``label`` and
    ``part`` are equal: megatron-core compares predicates by name.
    """

    def matches(parameter: torch.nn.Parameter, name: str) -> bool:
        is_exempt = exempts and (parameter.dim() == 1 or name.endswith(".bias"))
        return part in name and not is_exempt

    predicate = ParamWithNamePredicate(name=f"{label} of {part}", fn=matches)
    return ParamKey(with_name_predicate=predicate)


def _matrices(chunks: ModelChunks) -> list[torch.nn.Parameter]:
    """Return the parameters that Muon updates: hidden matrices, stacks of experts', routers'.

    Vocabulary matrices are excluded; the last stage's copy of the embedding, for multi-token
    prediction, is only marked as shared.
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
    """Set the learning rate of every group for the next step, times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]


@torch.no_grad()
def scale_rows(
    optimizer: MegatronOptimizer, factors: Mapping[torch.nn.Parameter, torch.Tensor]
) -> None:
    """Multiply rows of parameters, in the model and in this rank's main parameters.

    Args:
        optimizer: of the parameters.
        factors: fp32 [rows] by parameter, equal on all of its replicas.
    """
    for weight, rows in factors.items():
        wide = rows.view(-1, *[1] * (weight.dim() - 1))
        weight.data.copy_(weight.data.float() * wide)
    for leaf in leaves(optimizer):
        for model, main, span in mains(leaf):
            found = factors.get(model)  # type: ignore[call-overload]
            same = main.untyped_storage().data_ptr() == model.untyped_storage().data_ptr()
            if found is None or same:
                continue
            each = found.repeat_interleave(model.numel() // len(found))
            part = each if span is None else each[span.start : span.end]
            main.mul_(part.view(main.shape))
