"""Communication buffers of Transformer Engine's linear layers (--tp-comm-overlap)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from moetron.moe.config.schema.settings import Settings


def buffer_options(settings: Settings, kinds: Any) -> dict[str, Any]:
    """Return the arguments of Transformer Engine's ``initialize_ub``.

    Args:
        settings: the run's.
        kinds: Transformer Engine's enumeration of what buffers hold: ``FP8`` and ``NONE`` (bf16).
    """
    chosen, precision, file = settings.performance, settings.precision, None
    if chosen.tp_comm_overlap_cfg is not None:
        file = yaml.safe_load(Path(chosen.tp_comm_overlap_cfg).read_text(encoding="utf-8"))
    held = [kinds.NONE if precision.fp8_format is None else kinds.FP8]
    ends = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    if precision.fp8_format is not None and precision.first_last_layers_bf16 and ends:
        held.append(kinds.NONE)
    tokens = settings.model.seq_length * settings.training.micro_batch_size
    return {
        # Of the input that a tensor group gathers: all positions of a context rank.
        "shape": [tokens // settings.parallel.context_parallel_size, settings.model.hidden_size],
        "tp_size": settings.parallel.tensor_model_parallel_size,
        "quantization_modes": held,
        "ub_cfgs": file or {},
        "bootstrap_backend": chosen.tp_comm_bootstrap_backend,
    }


@contextmanager
def communication_buffers(settings: Settings) -> Iterator[None]:
    """Allocate the buffers (collective over all ranks) and free them at the end.

    Process groups must exist, layers must not.
    """
    if not settings.performance.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    base.initialize_ub(**buffer_options(settings, base.UserBufferQuantizationMode))
    try:
        yield
    finally:
        base.destroy_ub()
