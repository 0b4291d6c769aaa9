"""Silence expected library warnings."""

import logging
import warnings


def quieten_libraries() -> None:
    """Silence expected warnings; call before importing torch.

    megatron-core warns once for each fallback from Transformer Engine and Apex, torch about a CUDA
    toolkit without a GPU and about collectives that megatron-core calls by deprecated names. Our
    FFNs find their own process groups, so megatron-core's "Unknown MLP type" does not matter.
    megatron-core 0.19 also announces that GPTModel will end, and models of its own that it imports.
    """
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")  # intended
    warnings.filterwarnings("ignore", message=r"TypedStorage is deprecated")  # torch 2.10
    warnings.filterwarnings("ignore", message=r"\w+ is experimental and still under active")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for name, start in (
        ("transformer.transformer_layer", "Unknown MLP type"),
        ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ):
        _drop(logging.getLogger(f"megatron.core.{name}"), start)


def _drop(logger: logging.Logger, start: str) -> None:
    """Drop messages of ``logger`` that begin with ``start``."""
    logger.addFilter(lambda record: not record.getMessage().startswith(start))
