"""Read the auxiliary losses that megatron-core's routers have noted down."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings

_BALANCE_LOSS = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "noisy_load": "noisy_load_loss",
}  # --moe-router-load-balancing-type -> its name in megatron-core's tracker


def read_auxiliary_losses(
    settings: Settings,
    num_microbatches: int,
    groups: ProcessGroupCollection,
    device: torch.device | None = None,
) -> dict[str, float]:
    r"""The step's auxiliary losses, without their coefficients; clears megatron-core's tracker.

    With L the layers with experts, m micro-batches and d data-parallel ranks:

    - ``aux_loss`` = :math:`\frac{1}{L m d} \sum E \sum_i f_i P_i`, 1 when balanced, whatever k
      (noisy_load: two squared coefficients of variation, 0 when balanced).
      A rank's tracker holds the part of its own tokens (its share of P); parts add up over tensor
      and context ranks (global_aux_loss with running counts: over data-parallel ranks too).
    - ``z_loss`` = the mean over tokens of :math:`(\log \sum_j \exp x_j)^2`, averaged over L. A
      rank's tracker holds the mean over its own tokens (megatron-core itself logs rank 0's).

    Stages of the pipeline hold different layers. So one sum over all ranks gives every term.

    Args:
        settings: which losses are on, which layers have experts.
        num_microbatches: forward passes of each data-parallel rank since the last call.
        groups: ``tp``, ``cp`` and ``dp`` are read for their sizes.
        device: where the collective runs; None: the CPU.

    Returns:
        What is on of ``aux_loss`` and ``z_loss``; the same on every rank (collective).
    """
    sequence_ranks = groups.tp.size() * groups.cp.size()
    data_ranks = groups.dp.size()
    divisors = {}
    balance = settings.moe.moe_router_load_balancing_type
    if balance in _BALANCE_LOSS and settings.moe.moe_aux_loss_coeff > 0:
        counts = settings.moe.moe_global_aux_loss_counts
        summed = balance == "global_aux_loss" and counts == "running"
        parts = 1 if summed else data_ranks
        divisors["aux_loss"] = (_BALANCE_LOSS[balance], parts)
    if settings.moe.moe_z_loss_coeff:
        divisors["z_loss"] = ("z_loss", data_ranks * sequence_ranks)
    layers = sum(derived.routed_layers(settings))
    if not divisors or not layers:
        return {}
    tracker = get_moe_layer_wise_logging_tracker()
    sums = torch.zeros(len(divisors), dtype=torch.float64, device=device)
    for row, (name, parts) in enumerate(divisors.values()):
        if name in tracker:
            sums[row] = tracker[name]["values"].double().sum() / (parts * layers * num_microbatches)
    torch.distributed.all_reduce(sums)
    clear_aux_losses_tracker()
    return dict(zip(divisors, sums.tolist(), strict=True))
