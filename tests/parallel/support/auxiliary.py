"""Auxiliary losses of routers, read at once."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from moetron.moe.config.schema.settings import Settings
from moetron.moe.routing.losses import auxiliary_losses, take_auxiliary_losses


def read_auxiliary_losses(
    settings: Settings, num_microbatches: int, groups: ProcessGroupCollection
) -> dict[str, float]:
    """Return the losses since the last call; collective over all ranks."""
    sums = take_auxiliary_losses(settings, torch.device("cpu"))
    for total in sums.values():
        torch.distributed.all_reduce(total)
    numbers = {name: float(total) for name, total in sums.items()}
    return auxiliary_losses(settings, numbers, num_microbatches, groups)
