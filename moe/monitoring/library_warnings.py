"""Silence expected library warnings."""

import logging
import warnings


def quieten_libraries() -> None:
    """Silence expected warnings; call before importing torch.

    megatron-core warns once for each fallback from Transformer Engine and Apex, torch about a CUDA
    toolkit without a GPU and about collectives that megatron-core calls by deprecated names. Our
    FFNs find their own process groups, so megatron-core's "Unknown MLP type" does not matter.
    """
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")  # intended
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    layers = logging.getLogger("megatron.core.transformer.transformer_layer")
    layers.addFilter(lambda record: not record.getMessage().startswith("Unknown MLP type"))
