"""The metrics of a step, reduced over all ranks.

What a step records stays on the device as sums of this rank until `read_all`: one all-reduce and
one copy to the host serve all metrics. Every copy makes the host wait until the device has caught
up, and the device then waits for the host to launch again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.utils import unwrap_model

from moetron.moe.config.schema.derived import routed_layers
from moetron.moe.health.spikes import StepValues
from moetron.moe.megatron.version_differences import take_prediction_losses
from moetron.moe.routing.losses import auxiliary_losses, take_auxiliary_losses
from moetron.moe.routing.router import Router
from moetron.moe.routing.routing_record import RoutingSummary
from moetron.moe.training.loss_tally import Losses
from moetron.moe.training.trainer import Trainer


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step, equal on all ranks."""

    losses: Losses
    grad_norm: float
    """Norm of the full gradient before clipping."""
    values: StepValues
    """Loss and norm, also by rank, for the decision about the update."""
    extra: dict[str, Any]
    """Of `output_metrics`, `prediction_metrics`, `auxiliary_metrics`, `routing_metrics` and
    `logit_metrics`."""
    loads: dict[str, np.ndarray]
    """Load over mean load of every expert, float64 [E], by layer."""
    bias_ranges: dict[str, float]
    """Range of the expert biases, by layer; empty without them."""
    stop: bool
    """Whether any rank got a stop request."""
    peak_memory_bytes: int
    """Highest peak of any rank since its start; see `moe/host/allocator.py`."""


@dataclass(frozen=True)
class Recorded:
    """Sums of this rank on its device, and what their sums over all ranks mean."""

    sums: torch.Tensor
    """Any shape; int64 below 2^53 or a float type."""
    read: Callable[[torch.Tensor], dict[str, Any]]
    """Takes the sums over all ranks, float64 on the CPU, in the same shape."""


def read_all(sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return ``sums`` added up over all ranks: float64 on the CPU.

    The step's only wait for the device.
    """
    total = torch.cat([each.flatten().double() for each in sums])
    # All-reduce over all ranks: every rank holds the sums of its own samples, positions, layers or
    # experts, and zeros elsewhere. One collective for all, since each costs a latency per step.
    torch.distributed.all_reduce(total)
    parts = total.cpu().split([each.numel() for each in sums])
    return [part.view(each.shape) for part, each in zip(parts, sums, strict=True)]


def recorded_metrics(trainer: Trainer, num_microbatches: int) -> list[Recorded]:
    """Take what model and routers recorded since the last step."""
    return [
        *output_metrics(trainer),
        *prediction_metrics(trainer, num_microbatches),
        *auxiliary_metrics(trainer, num_microbatches),
        *routing_metrics(trainer),
        *bias_metrics(trainer),
        *logit_metrics(trainer),
    ]


def output_metrics(trainer: Trainer) -> list[Recorded]:
    """Take ``output_z_loss``, if it has a coefficient.

    It is the mean of (log Z)^2 over the loss tokens of the global batch, without the coefficient.
    Last-stage ranks hold the sums of their tokens, others zeros.
    """
    if trainer.settings.model.output_z_loss_coeff is None:
        return []
    runtime = trainer.runtime
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for model in unwrap_model(trainer.chunks):
        recorded = model.take_squared_log_z()
        if runtime.holds_loss and recorded.device == sums.device:  # elsewhere: nothing recorded yet
            sums += recorded

    def read(sums: torch.Tensor) -> dict[str, Any]:
        total, tokens = sums.tolist()
        return {"output_z_loss": total / max(tokens, 1.0)}

    return [Recorded(sums, read)]


def prediction_metrics(trainer: Trainer, num_microbatches: int) -> list[Recorded]:
    """Take the losses of multi-token prediction, if it is on.

    ``mtp_losses``: for each module the mean over micro-batches of its mean loss, without its weight
    (nats per token). megatron-core records them on the ranks of the last stage.
    """
    modules = trainer.settings.model.mtp_num_layers
    if modules is None:
        return []
    recorded, runtime = take_prediction_losses(), trainer.runtime
    sums = torch.zeros(modules + 1, dtype=torch.float64, device=runtime.device)
    if runtime.holds_loss:
        assert recorded is not None
        sums[:-1], sums[-1] = recorded, num_microbatches
    # The last entry counts micro-batches.
    return [Recorded(sums, lambda sums: {"mtp_losses": (sums[:-1] / sums[-1]).tolist()})]


def auxiliary_metrics(trainer: Trainer, num_microbatches: int) -> list[Recorded]:
    """Take ``aux_loss`` and ``z_loss``, without their coefficients, if they are on."""
    settings, groups = trainer.settings, trainer.runtime.groups
    taken = take_auxiliary_losses(settings, trainer.runtime.device)
    if not taken:
        return []

    def read(sums: torch.Tensor) -> dict[str, Any]:
        named = dict(zip(taken, sums.tolist(), strict=True))
        return dict(auxiliary_losses(settings, named, num_microbatches, groups))

    return [Recorded(torch.stack(list(taken.values())), read)]


LOADS = "loads"
"""Key of the load of every expert, which is not a metric of its own."""


def routing_metrics(trainer: Trainer) -> list[Recorded]:
    """Take the counts of routing, unless the model is dense.

    ``expert_load_max_over_mean``, the load of a layer's busiest expert over the mean, averaged over
    layers, and ``expert_load``, the same by layer; with a capacity ``dropped_fraction`` of choices,
    over all layers, ``dropped_fractions``, by layer, and ``dropped_by_position``, by layer and part
    of the sequence; and `LOADS`.
    """
    if trainer.recorder is None:
        return []
    counts = trainer.recorder.counts.double()
    trainer.recorder.reset()
    return [Recorded(counts, lambda sums: _routing(trainer, RoutingSummary.of(sums.long())))]


def _routing(trainer: Trainer, summary: RoutingSummary) -> dict[str, Any]:
    metrics: dict[str, Any] = {"expert_load_max_over_mean": summary.load_max_over_mean}
    chosen_LE = summary.chosen.double()  # [MoE layers, experts]
    loads_LE = (chosen_LE / chosen_LE.mean(1, keepdim=True)).numpy()
    names = _layer_names(trainer)
    loads = dict(zip(names, loads_LE, strict=True))
    metrics["expert_load"] = {name: float(load_E.max()) for name, load_E in loads.items()}
    if trainer.settings.moe.moe_expert_capacity_factor is not None:
        metrics["dropped_fraction"] = summary.dropped_fraction
        metrics["dropped_fractions"] = dict(zip(names, summary.dropped_fractions, strict=True))
        metrics["dropped_by_position"] = dict(zip(names, summary.dropped_by_position, strict=True))
    return {**metrics, LOADS: loads}


BIAS_RANGES = "bias_ranges"
"""Key of the range of expert biases by layer, which is not a metric of its own."""


def bias_metrics(trainer: Trainer) -> list[Recorded]:
    """Take the range (largest - smallest) of every layer's expert biases, if there are any."""
    if not trainer.settings.moe.moe_router_enable_expert_bias:
        return []
    names = _layer_names(trainer)
    flags = routed_layers(trainer.settings)
    ranges_L = torch.zeros(len(names), dtype=torch.float64, device=trainer.runtime.device)
    for router in (m for chunk in trainer.chunks for m in chunk.modules() if isinstance(m, Router)):
        # One of the ranks that replicate the layer: nothing counts twice.
        if router.enable_expert_bias and router.tp_dp_cp_group.rank() == 0:
            bias_E, layer = router.expert_bias, router.layer_number - 1
            ranges_L[sum(flags[:layer])].copy_(bias_E.max() - bias_E.min())
    return [
        Recorded(ranges_L, lambda sums: {BIAS_RANGES: dict(zip(names, sums.tolist(), strict=True))})
    ]


def logit_metrics(trainer: Trainer) -> list[Recorded]:
    """Take ``max_attention_logit``, the largest of all layers and heads, if it is asked for."""
    if trainer.logits is None:
        return []
    runtime = trainer.runtime
    largest_R = torch.zeros(runtime.world_size, dtype=torch.float64, device=runtime.device)
    largest_R[runtime.rank] = trainer.logits.largest()
    return [Recorded(largest_R, lambda found: {"max_attention_logit": float(found.max())})]


def _layer_names(trainer: Trainer) -> list[str]:
    """Return the keys of layers with experts."""
    return [f"layer_{n}" for n, sparse in enumerate(routed_layers(trainer.settings)) if sparse]
