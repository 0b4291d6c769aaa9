"""Optimizer state as sharded tensors named after parameters, so that any layout loads any other.

megatron-core 0.16.1 saves the optimizer by its own structure: a state of two chained optimizers
does not load into one, and the distributed optimizer's flat shards cannot be restored with torch's
Adam. Here every moment and every fp32 main parameter becomes a sharded tensor whose place in the
global tensor is that of its parameter in the model's sharded state dict. Keys, for a parameter
NAME:

- ``optimizer.state.exp_avg.NAME`` and ``optimizer.state.exp_avg_sq.NAME`` (Adam), or
  ``optimizer.state.momentum_buffer.NAME`` (SGD, Muon's matrices);
- ``optimizer.state.fp32_param.NAME``, unless the model's parameter is fp32 itself;
- ``optimizer.step``, once.

Adafactor's ``exp_avg_sq_row`` and ``exp_avg_sq_col`` are written at the parameter's full shape,
each value repeated along its row or column, so that they are sharded like the parameter.

The first two kinds are also the keys of megatron-core's plain optimizer.

The distributed optimizer splits its buffers into one flat shard per data-parallel rank, regardless
of parameter boundaries. To save, the rank that holds a parameter's first element receives the rest
of it from the following ranks, so that no rank holds more than its shard and one more parameter. To
load, each rank reads the parameters that overlap its shard.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from moetron.moe.checkpoint.states.parameter_span import Span, gathered
from moetron.moe.checkpoint.states.scaled_state import MAIN, OffloadedState, ScaledState
from moetron.moe.optim.adafactor import FACTOR_AXIS, Adafactor
from moetron.moe.optim.muon import Muon

Entry: TypeAlias = ShardedTensor | ShardedTensorFactory

PREFIX = "optimizer.state"
STEP_KEY = "optimizer.step"
MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True)
class Slot:
    """One parameter's optimizer state on this rank."""

    entry: Entry
    """Entry of the model: the parameter, its name and its place in the global tensor."""
    main: Tensor
    """Tensor that the optimizer updates: fp32, the parameter's shape; flat [end - start] if split
    by a span. Of `scaled` state: this rank's part of the parameter itself."""
    state: dict[str, Tensor]
    """The inner optimizer's live state for ``main``; empty before the first step."""
    moments: tuple[str, ...]
    span: Span | None
    scaled: ScaledState | OffloadedState | None
    """State in other formats, with the main parameters (--use-precision-aware-optimizer)."""

    @property
    def parameter(self) -> Tensor:
        """The model's parameter, in the model's dtype."""
        return self.entry.data

    @property
    def offloaded(self) -> bool:
        """Return whether the state stays on the CPU, as the device might lack the memory."""
        return isinstance(self.scaled, OffloadedState)

    @property
    def is_split(self) -> bool:
        """Return whether other ranks hold parts of the parameter, which is read as a whole.

        A rank may hold a little of every parameter: read to the device, all would not fit.
        """
        return self.span is not None and self.span.is_split

    @property
    def separate_main(self) -> bool:
        """Return whether the fp32 main parameter is separate from the model's."""
        return self.parameter.dtype != torch.float32

    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors that a checkpoint holds beside the weights."""
        return (*self.moments, MAIN) if self.separate_main else self.moments

    def local(self, name: str) -> Tensor:
        """Return this rank's part of a tensor to save; a moment before the first step is zero."""
        if self.scaled is not None:
            return self.scaled.read(self.main, name)
        if name == MAIN:
            return self.main
        moment = self.state.get(name)
        if moment is None:
            return torch.zeros_like(self.main)
        return moment.expand_as(self.main).contiguous()


def is_entry(value: object) -> bool:
    """Return whether a value of a sharded state dict is a tensor's entry."""
    return isinstance(value, ShardedTensor | ShardedTensorFactory)


def leaves(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers of a chain that own parameters (usually dense and expert ones)."""
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [leaf for leaf in chain if not leaf.is_stub_optimizer]


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict
) -> ShardedStateDict:
    """Return the entries to save, {key: sharded tensor}; collective over each data-parallel group.

    Args:
        optimizer: from ``get_megatron_optimizer``.
        model_state: sharded state dicts of the model's chunks, whose tensors are the parameters.
    """
    entries = _entries(model_state)
    saved: ShardedStateDict = {}
    for leaf in leaves(optimizer):
        for slot in _slots(leaf, entries):
            saved.update(_saved_entries(slot))
    step = torch.tensor([optimizer_step(optimizer)])
    return {**saved, STEP_KEY: _step_entry(step)}


def load_request(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, saved: Collection[str]
) -> tuple[ShardedStateDict, Callable[[ShardedStateDict], None]]:
    """Return the entries to read, {key: empty sharded tensor}, and a function that restores them.

    Args:
        optimizer: from ``get_megatron_optimizer``, before or after its first step.
        model_state: sharded state dicts of the model's chunks.
        saved: keys of the checkpoint. Main parameters come from ``fp32_param``, or from the weights
            if it has none: a bf16 run loads an fp32 run's checkpoint exactly.
    """
    entries = _entries(model_state)
    slots = [slot for leaf in leaves(optimizer) for slot in _slots(leaf, entries)]
    has_mains = any(key.startswith(f"{PREFIX}.{MAIN}.") for key in saved)
    request: ShardedStateDict = {STEP_KEY: _step_entry(torch.tensor([-1]))}
    for slot in slots:
        for name in slot.names():
            on_host = slot.offloaded or slot.is_split
            where = torch.device("cpu") if on_host else slot.parameter.device
            blank = torch.empty_like(slot.parameter, dtype=torch.float32, device=where)
            entry = make_sharded_optimizer_tensor(_placed(slot), blank, f"{PREFIX}.{name}")
            if name == MAIN and not has_mains:
                entry = replace(entry, key=slot.entry.key)
            request[_key(slot, name)] = entry

    def restore(loaded: ShardedStateDict) -> None:
        for slot in slots:
            _restore_slot(slot, loaded)
        for leaf in leaves(optimizer):
            for inner in _counting(leaf):
                _set_step(inner, int(loaded[STEP_KEY].item()))

    return request, restore


def exact_entry(entry: Entry, saved: Collection[str]) -> Entry:
    """Return the model's entry, redirected to the saved fp32 main parameter if more exact."""
    if entry.data.dtype != torch.float32:
        return entry
    exact = replace(entry, key=f"{PREFIX}.{MAIN}.{entry.key}")
    return exact if is_saved(exact, saved) else entry


def is_saved(entry: Entry, saved: Collection[str]) -> bool:
    """Return whether a checkpoint with the keys ``saved`` holds all parts of ``entry``."""
    parts = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    return all(part.key in saved for part in nested_values({"": parts}))


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Return the steps done: torch's Adam counts by parameter, Transformer Engine's by group."""
    steps = {0}
    for leaf in leaves(optimizer):
        for inner in _counting(leaf):
            steps.update(int(group["step"]) for group in inner.param_groups if "step" in group)
            states = inner.state.values()
            steps.update(int(state["step"]) for state in states if "step" in state)
    return max(steps)


def _counting(leaf: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that count steps: with offload those of the CPU and the device."""
    inner = leaf.optimizer
    return inner.sub_optimizers if isinstance(inner, HybridDeviceOptimizer) else [inner]


def _set_step(inner: torch.optim.Optimizer, step: int) -> None:
    if isinstance(inner, torch.optim.SGD):  # it has no counter
        return
    by_parameter = isinstance(inner, torch.optim.Adam | torch.optim.AdamW)
    for group in inner.param_groups:
        if not by_parameter:
            group["step"] = step
            continue
        for main in group["params"]:
            if isinstance(inner, Muon) and "exp_avg" not in inner.moments(main):
                continue
            on_device = group.get("fused") or group.get("capturable")
            inner.state[main]["step"] = torch.tensor(
                float(step), device=main.device if on_device else "cpu"
            )


def _entries(model_state: ShardedStateDict) -> dict[int, Entry]:
    """Return model entries by the ``id`` of their parameter."""
    return {id(entry.data): entry for entry in nested_values(model_state) if is_entry(entry)}


def _slots(leaf: MegatronOptimizer, entries: dict[int, Entry]) -> Iterator[Slot]:
    moments = MOMENTS[leaf.config.optimizer]
    if leaf.config.optimizer == "sgd" and leaf.config.sgd_momentum == 0:
        moments = ()
    inner = leaf.optimizer
    scaled: ScaledState | OffloadedState | None = None
    if isinstance(inner, HybridDeviceOptimizer):
        scaled = OffloadedState.of(inner)
    elif _is_precision_aware(leaf):
        scaled = ScaledState(inner)
    for parameter, main, span in mains(leaf):
        assert id(parameter) in entries, "a trained parameter is not in the model's sharded state"
        own = inner.moments(main) if isinstance(inner, Adafactor | Muon) else moments
        yield Slot(entries[id(parameter)], main, inner.state[main], own, span, scaled)


def _is_precision_aware(leaf: MegatronOptimizer) -> bool:
    return bool(leaf.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)


def mains(leaf: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor, Span | None]]:
    """Yield (model parameter, main parameter, span) in the same order on all ranks of the group."""
    if isinstance(leaf, DistributedOptimizer):
        shards = dict(_distributed_mains(leaf))
        for buffer in leaf.buffers:
            for parameter, (start, end, bucket) in buffer.param_index_map.items():
                if parameter in shards:
                    span = _span(leaf, buffer.buckets[bucket], start, end)
                    yield parameter, shards[parameter], span
    elif isinstance(leaf, Float16OptimizerWithFloat16Params):
        for model_group, main_group in _paired(leaf.float16_groups, leaf.fp32_from_float16_groups):
            yield model_group, main_group, None
        for group in leaf.fp32_from_fp32_groups:
            yield from ((parameter, parameter, None) for parameter in group)
    else:
        yield from ((parameter, parameter, None) for parameter in leaf.get_parameters())


def _distributed_mains(leaf: DistributedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    yield from _paired(leaf.model_fp32_groups, leaf.shard_fp32_groups)
    shards = leaf.shard_fp32_from_float16_groups
    if _is_precision_aware(leaf):  # which has no others
        shards = leaf.shard_float16_groups
    yield from _paired(leaf.model_float16_groups, shards)


def _paired(
    left: Iterable[list[Tensor]], right: Iterable[list[Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    for left_group, right_group in zip(left, right, strict=True):
        yield from zip(left_group, right_group, strict=True)


def _span(leaf: DistributedOptimizer, bucket: _ParamAndGradBucket, start: int, end: int) -> Span:
    """Return the span of a parameter at ``[start, end)`` of the buffer that holds ``bucket``."""
    group = leaf.data_parallel_group
    shard = bucket.grad_data.numel() // group.size()
    first_rank, offset = divmod(start - bucket.offset, shard)
    last_rank = (end - 1 - bucket.offset) // shard
    low = (group.rank() - first_rank) * shard - offset
    return Span(
        group, max(0, low), min(end - start, low + shard), first_rank, last_rank, shard, offset
    )


def _saved_entries(slot: Slot) -> ShardedStateDict:
    tensors = [slot.local(name) for name in slot.names()]
    if slot.span is not None:
        tensors = gathered(tensors, slot.span, slot.parameter)
    if not tensors:
        return {}
    return {
        _key(slot, name): make_sharded_optimizer_tensor(_placed(slot), tensor, f"{PREFIX}.{name}")
        for name, tensor in zip(slot.names(), tensors, strict=True)
    }


def _restore_slot(slot: Slot, loaded: ShardedStateDict) -> None:
    for name in slot.names():
        tensor = loaded[_key(slot, name)]
        if slot.span is not None:
            own, where = slot.span, tensor.device if slot.offloaded else slot.main.device
            tensor = tensor.view(-1)[own.start : own.end].to(where, copy=True)
        if slot.scaled is not None:
            slot.scaled.write(slot.main, name, tensor)
        elif name == MAIN:
            slot.main.data.copy_(tensor)
        elif name in FACTOR_AXIS:
            slot.state[name] = tensor.narrow(FACTOR_AXIS[name], 0, 1).clone()
        else:
            slot.state[name] = tensor


def _placed(slot: Slot) -> Entry:
    """Return the model's entry; with a span, its first rank is the main replica, not rank 0."""
    if slot.span is None:
        return slot.entry
    replica = slot.span.group.rank() - slot.span.first_rank
    assert len(slot.entry.replica_id) == 3, "replica ids are (pipeline, tensor, data)"
    return replace(slot.entry, replica_id=(*slot.entry.replica_id[:-1], replica))


def _key(slot: Slot, name: str) -> str:
    """Return the key in this rank's state dict; entries of stacked tensors have equal ``.key``."""
    return f"{PREFIX}.{name}.{id(slot.parameter)}"


def _step_entry(step: Tensor) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(STEP_KEY, step, replica_id=dist.get_rank())
