"""Named ranges of a step in profiles: passes, update, and parts of layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core.pipeline_parallel import combined_1f1b, schedules
from torch.profiler import record_function

MODULES = {
    "embedding": "embedding",
    "self_attention": "attention",
    "mlp": "ffn",
    "router": "router",
    "experts": "experts",
    "shared_experts": "shared experts",
    "output_layer": "output layer",
}
"""Last word of a module's name -> range of its forward pass."""
EXCHANGE = {
    "dispatch_preprocess": "dispatch",
    "token_dispatch": "dispatch",
    "dispatch_postprocess": "dispatch",
    "combine_preprocess": "combine",
    "token_combine": "combine",
    "combine_postprocess": "combine",
}
"""Method of a token dispatcher -> range."""
PASSES = {
    (schedules, "forward_step"): "forward",
    (schedules, "backward_step"): "backward",
    (combined_1f1b, "combined_forward_backward_step"): "forward and backward",
}
"""Function of megatron-core's schedules -> range."""


@contextmanager
def named_parts(chunks: Sequence[torch.nn.Module], optimizer: Any) -> Iterator[None]:
    """Name the parts of all steps inside the context; outside it they cost nothing.

    ``forward`` and ``backward`` of every micro-batch (together in the combined schedule of
    --overlap-moe-expert-parallel-comm), in forward passes the parts of layers, and ``update``.
    torch.profiler records the ranges, and ``emit_nvtx`` passes them to Nsight Systems.
    """
    found = list(_parts(chunks, optimizer))
    methods = [(owner, method) for owner, method, _ in found]
    before = {(module, function): getattr(module, function) for module, function in PASSES}
    for owner, method, name in found:
        setattr(owner, method, _named(name, getattr(owner, method)))
    for (module, function), name in PASSES.items():
        setattr(module, function, _named(name, before[module, function]))
    try:
        yield
    finally:
        for owner, method in methods:
            delattr(owner, method)  # of the object: that of its class is left
        for (module, function), original in before.items():
            setattr(module, function, original)


def _parts(chunks: Sequence[torch.nn.Module], optimizer: Any) -> Iterator[tuple[Any, str, str]]:
    """Yield (object, method, range)."""
    yield optimizer, "step_with_ready_grads", "update"
    for chunk in chunks:
        for path, module in chunk.named_modules():
            name = MODULES.get(path.rsplit(".", 1)[-1])
            if name is not None:
                yield module, "forward", name
            dispatcher = getattr(module, "token_dispatcher", None)
            for method, part in EXCHANGE.items() if dispatcher is not None else ():
                yield dispatcher, method, part


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return run
