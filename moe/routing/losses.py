"""Auxiliary losses that routers record during a step."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.routing.balance import BALANCE_LOSSES

_recorded: dict[str, torch.Tensor] = {}
"""Sums of this process by loss: float32 [layers], on the device of the model.

Not megatron-core's tracker, which versions keep in different places.
"""


def record_auxiliary_loss(name: str, part: torch.Tensor, layer: int, layers: int) -> None:
    """Add ``part`` to the loss ``name`` of ``layer`` (1-based) of ``layers``."""
    if name not in _recorded:
        _recorded[name] = torch.zeros(layers, device=part.device)
    _recorded[name][layer - 1].add_(part.detach())


def forget_auxiliary_losses() -> None:
    """Drop all sums: the next model may have other layers, on another device."""
    _recorded.clear()


def take_auxiliary_losses(settings: Settings, device: torch.device) -> dict[str, torch.Tensor]:
    """Return this rank's sums over layers since the last call, and clear them.

    ``aux_loss`` and ``z_loss``, if they are on: float64 scalars, 0 if no router ran here; of an
    encoder-decoder also ``encoder_aux_loss`` and the like. Nothing waits for the device. All ranks'
    sums, added up, go to `auxiliary_losses`.
    """
    names = {}
    balance = settings.moe.moe_router_load_balancing_type
    if balance in BALANCE_LOSSES and settings.moe.moe_aux_loss_coeff > 0:
        names["aux_loss"] = BALANCE_LOSSES[balance]
    if settings.moe.moe_z_loss_coeff:
        names["z_loss"] = "z_loss"
    if not any(derived.routed_layers(settings)):
        return {}
    sums = {}
    for metric, name in names.items():
        values = _recorded.get(name)
        if values is None:
            values = torch.zeros(len(derived.routed_layers(settings)), device=device)
        for label, layers in _summed(metric, settings).items():
            sums[label] = values[layers.start : layers.stop].double().sum()
        values.zero_()
    return sums


def _summed(metric: str, settings: Settings) -> dict[str, range]:
    """Return the layers over which a loss is summed, by its name in the log."""
    everything = {metric: range(len(derived.routed_layers(settings)))}
    stacks = derived.stack_layers(settings.model)
    if len(stacks) == 1:
        return everything
    return everything | {f"{stack}_{metric}": layers for stack, layers in stacks.items()}


def auxiliary_losses(
    settings: Settings,
    sums: dict[str, float],
    num_microbatches: int,
    groups: ProcessGroupCollection,
) -> dict[str, float]:
    r"""Return the step's auxiliary losses without coefficients.

    With L the layers with experts, m micro-batches and d data-parallel ranks:

    - ``aux_loss`` = :math:`\frac{1}{L m d} \sum E \sum_i f_i P_i`, 1 when balanced, for any k
      (noisy_load: two squared coefficients of variation, 0 when balanced).
    - ``z_loss`` = the mean over tokens of :math:`(\log \sum_j \exp x_j)^2`, averaged over L.

    Args:
        settings: which layers have experts.
        sums: those of `take_auxiliary_losses`, added up over all ranks: a rank records the
            parts of its own tokens, which add up over tensor, context and data ranks, for the
            layers of its own pipeline stage.
        num_microbatches: forward passes of each data-parallel rank.
        groups: ``dp`` is read for its size.
    """
    flags = derived.routed_layers(settings)
    means = {}
    for metric in ("aux_loss", "z_loss"):
        for name, layers in _summed(metric, settings).items():
            passes = groups.dp.size() * sum(flags[i] for i in layers) * num_microbatches
            if name in sums:
                means[name] = sums[name] / max(passes, 1)
    return means
