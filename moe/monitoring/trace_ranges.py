"""Named ranges of a step in profiles: passes, update, and parts of layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
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


@contextmanager
def named_parts(chunks: Sequence[torch.nn.Module], optimizer: Any) -> Iterator[None]:
    """Name the parts of all steps inside the context; outside it they cost nothing.

    ``forward`` and ``backward`` of every micro-batch, in forward passes the parts of layers, and
    ``update``. torch.profiler records the ranges, and ``emit_nvtx`` passes them to Nsight Systems.
    """
    found = list(_parts(chunks, optimizer))
    methods = [(owner, method) for owner, method, _ in found]
    passes = {"forward_step": "forward", "backward_step": "backward"}
    before = {function: getattr(schedules, function) for function in passes}
    for owner, method, name in found:
        setattr(owner, method, _named(name, getattr(owner, method)))
    for function, name in passes.items():
        setattr(schedules, function, _named(name, before[function]))
    try:
        yield
    finally:
        for owner, method in methods:
            delattr(owner, method)  # of the object: that of its class is left
        for function, original in before.items():
            setattr(schedules, function, original)


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
