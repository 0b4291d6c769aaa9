"""Keep out of a user's sight what libraries say about things that are as they should be."""

import logging
import warnings


def quieten_libraries() -> None:
    """Silence warnings about what cannot be changed here; call before importing torch.

    megatron-core warns once for each fall-back from Transformer Engine and Apex, torch about a
    CUDA toolkit without a GPU and about collectives that megatron-core calls by their old names.
    FFNs of ours find their process groups by themselves: megatron-core need not know their type.
    """
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")  # as meant
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    layers = logging.getLogger("megatron.core.transformer.transformer_layer")
    layers.addFilter(lambda record: not record.getMessage().startswith("Unknown MLP type"))
