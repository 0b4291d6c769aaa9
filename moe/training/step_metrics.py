"""The metrics of a step, reduced over all ranks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import unwrap_model

from moetron.moe.config.schema.derived import routed_layers
from moetron.moe.routing.losses import read_auxiliary_losses
from moetron.moe.training.loss_tally import Losses
from moetron.moe.training.trainer import Trainer


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step, equal on all ranks."""

    losses: Losses
    grad_norm: float
    """Norm of the full gradient before clipping."""
    extra: dict[str, Any]
    """`output_metrics`, `prediction_metrics` and `routing_metrics`."""
    loads: dict[str, np.ndarray]
    """Load over mean load of every expert, float64 [E], by layer."""
    stop: bool
    """Whether any rank got a stop request."""
    peak_memory_bytes: int
    """Highest peak of any rank since its start; see `moe/host/allocator.py`."""


def read_recorded_metrics(
    trainer: Trainer, num_microbatches: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Collect the metrics that model and routers recorded since the last step (collective).

    Returns ``extra`` and ``loads`` of `StepMetrics`.
    """
    routing, loads = routing_metrics(trainer, num_microbatches)
    ahead = prediction_metrics(trainer, num_microbatches)
    return {**output_metrics(trainer), **ahead, **routing}, loads


def output_metrics(trainer: Trainer) -> dict[str, float]:
    """Return ``output_z_loss`` since the last call (collective), if it has a coefficient.

    It is the mean of (log Z)^2 over the loss tokens of the global batch, without the coefficient.
    """
    if trainer.settings.model.output_z_loss_coeff is None:
        return {}
    runtime = trainer.runtime
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for model in unwrap_model(trainer.chunks):
        recorded = model.take_squared_log_z()
        sums += recorded.to(sums.device) if runtime.holds_loss else 0
    # All-reduce over all ranks: last-stage ranks hold the sums of their tokens, others zeros.
    torch.distributed.all_reduce(sums)
    total, tokens = sums.tolist()
    return {"output_z_loss": total / max(tokens, 1.0)}


def prediction_metrics(trainer: Trainer, num_microbatches: int) -> dict[str, Any]:
    """Return the losses of multi-token prediction since the last call (collective), if it is on.

    ``mtp_losses``: for each module the mean over micro-batches of its mean loss, without its weight
    (nats per token). megatron-core records them on the ranks of the last stage.
    """
    modules = trainer.settings.model.mtp_num_layers
    if modules is None:
        return {}
    recorded, runtime = MTPLossLoggingHelper.tracker, trainer.runtime
    sums = torch.zeros(modules + 1, dtype=torch.float64, device=runtime.device)
    if runtime.holds_loss:
        sums[:-1], sums[-1] = recorded["values"], num_microbatches
    if "values" in recorded:
        MTPLossLoggingHelper.clean_loss_in_tracker()
    # All-reduce over all ranks, as above; the last entry counts micro-batches.
    torch.distributed.all_reduce(sums)
    return {"mtp_losses": (sums[:-1] / sums[-1]).tolist()}


def routing_metrics(
    trainer: Trainer, num_microbatches: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return routing metrics since the last call over all ranks (collective), and ``loads``.

    ``aux_loss`` and ``z_loss`` without their coefficients; ``expert_load_max_over_mean``, the load
    of a layer's busiest expert over the mean, averaged over layers, and ``expert_load``, the same
    by layer; with a capacity ``dropped_fraction`` of choices, over all layers,
    ``dropped_fractions``, by layer, and ``dropped_by_position``, by layer and part of the sequence.
    Both are empty for a dense model.
    """
    if trainer.recorder is None:
        return {}, {}
    runtime, moe = trainer.runtime, trainer.settings.moe
    metrics: dict[str, Any] = dict(
        read_auxiliary_losses(trainer.settings, num_microbatches, runtime.groups, runtime.device)
    )
    summary = trainer.recorder.summary()
    trainer.recorder.reset()
    metrics["expert_load_max_over_mean"] = summary.load_max_over_mean
    chosen_LE = summary.chosen.double()  # [MoE layers, experts]
    loads_LE = (chosen_LE / chosen_LE.mean(1, keepdim=True)).numpy()
    names = [f"layer_{n}" for n, sparse in enumerate(routed_layers(trainer.settings)) if sparse]
    loads = dict(zip(names, loads_LE, strict=True))
    metrics["expert_load"] = {name: float(load_E.max()) for name, load_E in loads.items()}
    if moe.moe_expert_capacity_factor is not None:
        metrics["dropped_fraction"] = summary.dropped_fraction
        metrics["dropped_fractions"] = dict(zip(names, summary.dropped_fractions, strict=True))
        metrics["dropped_by_position"] = dict(zip(names, summary.dropped_by_position, strict=True))
    return metrics, loads
