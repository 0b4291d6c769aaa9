"""Auxiliary losses of a step, read from megatron-core's tracker."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.routing.balance import BALANCE_LOSSES


def read_auxiliary_losses(
    settings: Settings,
    num_microbatches: int,
    groups: ProcessGroupCollection,
    device: torch.device | None = None,
) -> dict[str, float]:
    r"""Return the step's auxiliary losses without coefficients; clears megatron-core's tracker.

    With L the layers with experts, m micro-batches and d data-parallel ranks:

    - ``aux_loss`` = :math:`\frac{1}{L m d} \sum E \sum_i f_i P_i`, 1 when balanced, for any k
      (noisy_load: two squared coefficients of variation, 0 when balanced).
    - ``z_loss`` = the mean over tokens of :math:`(\log \sum_j \exp x_j)^2`, averaged over L.

    Args:
        settings: which losses are on, which layers have experts.
        num_microbatches: forward passes of each data-parallel rank since the last call.
        groups: ``dp`` is read for its size.
        device: where the collective runs; None: the CPU.

    Returns:
        ``aux_loss`` and ``z_loss``, if they are on; the same on every rank (collective).
    """
    names = {}
    balance = settings.moe.moe_router_load_balancing_type
    if balance in BALANCE_LOSSES and settings.moe.moe_aux_loss_coeff > 0:
        names["aux_loss"] = BALANCE_LOSSES[balance]
    if settings.moe.moe_z_loss_coeff:
        names["z_loss"] = "z_loss"
    layers = sum(derived.routed_layers(settings))
    if not names or not layers:
        return {}
    tracker = get_moe_layer_wise_logging_tracker()
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for row, name in enumerate(names.values()):
        if name in tracker:
            sums[row] = tracker[name]["values"].double().sum()
    # All-reduce over all ranks: a tracker holds the parts of a rank's own tokens, which add up over
    # tensor, context and data ranks, for the layers of its own pipeline stage.
    torch.distributed.all_reduce(sums)
    clear_aux_losses_tracker()
    sums /= groups.dp.size() * layers * num_microbatches
    return dict(zip(names, sums.tolist(), strict=True))
