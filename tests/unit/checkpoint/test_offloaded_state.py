"""--optimizer-cpu-offload on a host, where a stand-in says which tensors are on a device."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from moetron.moe.checkpoint import optimizer_state
from moetron.moe.checkpoint.optimizer_state import (
    leaves,
    load_request,
    optimizer_step,
    sharded_optimizer_state,
)
from moetron.moe.config.bridge import transformer_config
from moetron.moe.optim.update import clip_and_update, norm_of, prepare_gradients
from moetron.moe.training.model_chunks import ModelChunks, build_chunks
from moetron.moe.training.optimizer import build_optimizer, set_learning_rate
from moetron.moe.training.runtime import Runtime
from tests.parallel.support.harness import model_parallel
from tests.unit.config.config_cases import make

SHAPE = {
    "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8,
    "moe_ffn_hidden_size": 16, "num_experts": 2, "moe_router_topk": 1, "expert_lr_mult": 0.5,
    "moe_router_pre_softmax": True, "bf16": True, "use_distributed_optimizer": True,
}  # fmt: skip
Built = tuple[ModelChunks, MegatronOptimizer]


def _marks(method: Callable[..., Any], always: bool = False) -> Callable[..., Any]:
    """Return ``method`` whose results are on the host if its tensor is, or ``always``."""

    def called(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        result = method(tensor, *rest, **named)
        result.is_on_host = always or getattr(tensor, "is_on_host", False)
        return result

    return called


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let OptimizerConfig accept a host, which has no Transformer Engine."""
    monkeypatch.setattr(
        "megatron.core.optimizer.optimizer_config.is_te_min_version", lambda _: True
    )


def _build(monkeypatch: pytest.MonkeyPatch, fraction: float | None) -> Built:
    """Build with this fraction of the state on the CPU; None: without offload."""
    changes: dict[str, Any] = {}
    if fraction is not None:
        changes = {
            "use_precision_aware_optimizer": True,
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": fraction,
        }
    settings = make(**SHAPE, **changes)
    runtime = Runtime(0, 1, torch.device("cpu"), ProcessGroupCollection.use_mpu_process_groups())
    chunks = build_chunks(settings, transformer_config(settings), 64, runtime)
    with monkeypatch.context() as patch:
        if fraction is not None:
            is_cuda = property(lambda tensor: not getattr(tensor, "is_on_host", False))
            patch.setattr(torch.Tensor, "is_cuda", is_cuda, raising=False)
            patch.setattr(torch.Tensor, "cpu", _marks(torch.Tensor.clone, always=True))
            patch.setattr(torch.Tensor, "pin_memory", _marks(torch.Tensor.clone))
            for name in ("detach", "clone", "float"):
                patch.setattr(torch.Tensor, name, _marks(getattr(torch.Tensor, name)))
        optimizer = build_optimizer(settings, chunks, runtime)
    return chunks, optimizer


def _steps(built: Built, seeds: list[int]) -> None:
    """Step as the loop does: clip to norm 1, then update."""
    chunks, optimizer = built
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for chunk in chunks:
            chunk.zero_grad_buffer()
            for _, parameter in sorted(chunk.named_parameters()):
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.main_grad.copy_(drawn)  # type: ignore[attr-defined]
        set_learning_rate(optimizer, 0.01 / seed)
        clip_and_update(optimizer, norm_of(prepare_gradients(optimizer).tolist()))


def _saved(built: Built) -> dict[str, Any]:
    weights = {"model": unwrap_model(built[0][0]).sharded_state_dict()}
    entries = sharded_optimizer_state(built[1], weights)
    return {key: copy.deepcopy(entry.data) for key, entry in entries.items()}


def _load(built: Built, saved: dict[str, Any]) -> None:
    weights = {"model": unwrap_model(built[0][0]).sharded_state_dict()}
    mains = {f"optimizer.state.fp32_param.{key}" for key in saved}
    request, restore = load_request(built[1], weights, mains)
    step, *names = request
    assert step == optimizer_state.STEP_KEY and len(saved) == len(request)
    *values, steps = saved.values()
    restore({step: steps, **dict(zip(names, values, strict=True))})


def _inner(built: Built) -> list[HybridDeviceOptimizer]:
    return [leaf.optimizer for leaf in leaves(built[1])]


def _close(first: Built, second: Built, exactly: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-5, "atol": 1e-7}
    for value, other in zip(_saved(first).values(), _saved(second).values(), strict=True):
        torch.testing.assert_close(value, other, **tolerance)
    weights, others = (dict(built[0][0].named_parameters()) for built in (first, second))
    for name, value in weights.items():
        rounding = tolerance if exactly else {"rtol": 2**-7, "atol": 1e-6}
        torch.testing.assert_close(value, others[name], **rounding)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_offload_changes_no_mathematics(monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    """Moments, main parameters and weights are those of the same run without offload."""
    with model_parallel():
        plain, offloaded = (_build(monkeypatch, each) for each in (None, fraction))
        offloaded[0][0].load_state_dict(plain[0][0].state_dict())
        for _, optimizer in (plain, offloaded):
            optimizer.reload_model_params()
        for inner in _inner(offloaded):
            assert isinstance(inner, HybridDeviceOptimizer)
            assert inner.cpu_optimizers and (inner.gpu_optimizer is None) == (fraction == 1)
        for built in (plain, offloaded):
            _steps(built, [1, 2])
        assert optimizer_step(offloaded[1]) == 2
        _close(plain, offloaded)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_resumed_run_is_equal(monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    with model_parallel():
        first, second = (_build(monkeypatch, fraction) for _ in range(2))
        _steps(first, [1, 2])
        second[0][0].load_state_dict(first[0][0].state_dict())
        _load(second, _saved(first))
        assert optimizer_step(second[1]) == 2
        for built in (first, second):
            _steps(built, [3])
        _close(first, second, exactly=True)


def test_checkpoints_do_not_depend_on_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run continues with offload, and another without it."""
    with model_parallel():
        plain, offloaded = (_build(monkeypatch, each) for each in (None, 1.0))
        _steps(plain, [1, 2])
        offloaded[0][0].load_state_dict(plain[0][0].state_dict())
        _load(offloaded, _saved(plain))
        _close(plain, offloaded, exactly=True)
        for built in (plain, offloaded):
            _steps(built, [3])
        _close(plain, offloaded)
        again = _build(monkeypatch, None)
        again[0][0].load_state_dict(offloaded[0][0].state_dict())
        _load(again, _saved(offloaded))
        _close(offloaded, again, exactly=True)


def test_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with model_parallel():
        *values, step = _saved(_build(monkeypatch, 1.0)).values()
        assert step.item() == 0
        assert not any(value.any() for value in values[0::3] + values[1::3])
        assert all(value.dtype == torch.float32 for value in values)
