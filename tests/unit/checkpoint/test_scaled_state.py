"""Checkpoints of --use-precision-aware-optimizer; the AdamW is a stand-in for its real one."""

import copy
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer import optimizer_config as megatron_config
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from moetron.moe.checkpoint import optimizer_state
from moetron.moe.checkpoint.optimizer_state import load_request, sharded_optimizer_state
from moetron.moe.checkpoint.states.scaled_state import joined, remainder
from moetron.moe.config.bridge import transformer_config
from moetron.moe.training.model_chunks import ModelChunks, build_chunks
from moetron.moe.training.optimizer import build_optimizer
from moetron.moe.training.runtime import Runtime
from tests.parallel.support.harness import model_parallel
from tests.unit.config.config_cases import make

SHAPE = {
    "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8,
    "moe_ffn_hidden_size": 16, "num_experts": 2, "moe_router_topk": 1,
    "moe_router_pre_softmax": True, "bf16": True, "use_distributed_optimizer": True,
}  # fmt: skip
PRECISION_AWARE = {"use_precision_aware_optimizer": True}


class FusedAdam(torch.optim.Optimizer):
    """The state of Transformer Engine 2.11's class of this name, and a plain update."""

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        assert adam_w_mode and master_weights and use_decoupled_grad and not capturable
        self.dtypes = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            "master_param": master_weight_dtype,
        }
        self.scales: dict[Any, float] = {}
        self.store_param_remainders = (
            store_param_remainders and master_weight_dtype == torch.float32
        )

    def _is_remainder(self, param: torch.Tensor, name: str) -> bool:
        kept = self.store_param_remainders and param.dtype == torch.bfloat16
        return kept and name == "master_param"

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        value = self.state[param][name]
        if self.dtypes[name] == torch.float32:
            assert value.dtype == (
                torch.int16 if self._is_remainder(param, name) else torch.float32
            )
            return value
        return value.float() * self.scales.get((param, name), 1.0)

    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        assert value.dtype == (torch.int16 if self._is_remainder(param, name) else torch.float32)
        dtype = value.dtype if self._is_remainder(param, name) else self.dtypes[name]
        if dtype == torch.float16:
            self.scales[param, name] = float(value.abs().max()) / 32752 or 1.0
            value.div_(self.scales[param, name])
        self.state[param][name] = value.to(dtype, copy=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    for name in ("exp_avg", "exp_avg_sq"):
                        self.set_scaled_state(param, name, torch.zeros_like(param).float())
                    rest = torch.zeros_like(param, dtype=torch.int16)
                    whole = not self._is_remainder(param, "master_param")
                    self.set_scaled_state(param, "master_param", param.float() if whole else rest)
                grad = param.decoupled_grad.float()
                mean = self.get_unscaled_state(param, "exp_avg").lerp(grad, 0.1)
                square = self.get_unscaled_state(param, "exp_avg_sq").lerp(grad**2, 0.05)
                main = self.get_unscaled_state(param, "master_param")
                main = joined(param, main) if main.dtype == torch.int16 else main
                main = main - group["lr"] * mean / (square.sqrt() + 1e-8)
                self.set_scaled_state(param, "exp_avg", mean)
                self.set_scaled_state(param, "exp_avg_sq", square)
                weight = _rounded_away(main)
                param.copy_(weight if self.store_param_remainders else main)
                if self._is_remainder(param, "master_param"):
                    main = main.view(torch.int16)[1 - _upper() :: 2]
                self.set_scaled_state(param, "master_param", main.clone())


def _upper() -> int:
    """Return the index of the upper one of an fp32 number's two int16."""
    return 1 if sys.byteorder == "little" else 0


def _rounded_away(main: torch.Tensor) -> torch.Tensor:
    """Round fp32 to bf16, ties away from zero, as Transformer Engine's kernel does."""
    halves = main.clone().view(torch.int16).unflatten(-1, (-1, 2))
    upper, lower = halves[..., _upper()], halves[..., 1 - _upper()]
    return (upper + (lower < 0)).to(torch.int16).view(torch.bfloat16)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bits_of_a_main_parameter(numbers: list[float]) -> None:
    """Each main parameter is restored exactly for Transformer Engine's weight, and for torch's
    unless it is a tie.
    """
    main = torch.tensor(numbers, dtype=torch.float32)
    main = main[main.abs() < 3e38]  # rounds to infinity above
    weight = _rounded_away(main)
    assert torch.equal(joined(weight, remainder(weight, main)), main)
    nearest = main.bfloat16()
    found = joined(nearest, remainder(nearest, main)).view(torch.int32)
    assert ((found - main.view(torch.int32)).abs() <= 1).all()


def test_a_tie_between_weights() -> None:
    main = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)
    nearest = main.bfloat16()  # the lower neighbour, the upper neighbour
    found = joined(nearest, remainder(nearest, main)).view(torch.int32)
    assert found.tolist() == [0x3F807FFF, 0x3F818000]


@pytest.fixture(autouse=True)
def _transformer_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("transformer_engine.pytorch.optimizers")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for user in (megatron_optimizer, megatron_config):
        monkeypatch.setattr(user, "is_te_min_version", lambda _: True)
    yield


def _build(monkeypatch: pytest.MonkeyPatch, **formats: Any) -> tuple[ModelChunks, Any]:
    aware = formats.get("use_precision_aware_optimizer", False)
    with monkeypatch.context() as patch:
        adam = FusedAdam if aware else torch.optim.AdamW
        for user in (megatron_optimizer, distrib_optimizer):
            patch.setattr(user, "Adam", adam)
        patch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", not aware)
        settings = make(**SHAPE, **formats)
        runtime = Runtime(
            0, 1, torch.device("cpu"), ProcessGroupCollection.use_mpu_process_groups()
        )
        chunks = build_chunks(settings, transformer_config(settings), 64, runtime)
        return chunks, build_optimizer(settings, chunks, runtime)


def _steps(chunks: ModelChunks, optimizer: MegatronOptimizer, seeds: list[int]) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for chunk in chunks:
            chunk.zero_grad_buffer()
            for _, parameter in sorted(chunk.named_parameters()):
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.main_grad.copy_(drawn)  # type: ignore[attr-defined]
        optimizer.prepare_grads()
        optimizer.step_with_ready_grads()


def _saved(chunks: ModelChunks, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Return what a checkpoint holds: entries in the order of parameters, the step last."""
    weights = {"model": unwrap_model(chunks[0]).sharded_state_dict()}
    entries = sharded_optimizer_state(optimizer, weights)
    return {key: copy.deepcopy(entry.data) for key, entry in entries.items()}


def _load(chunks: ModelChunks, optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    weights = {"model": unwrap_model(chunks[0]).sharded_state_dict()}
    mains = {f"optimizer.state.fp32_param.{key}" for key in saved}
    request, restore = load_request(optimizer, weights, mains)
    step, *names = request
    assert step == optimizer_state.STEP_KEY and len(saved) == len(request)
    *values, steps = saved.values()
    restore({step: steps, **dict(zip(names, values, strict=True))})


FORMATS = [
    {},
    {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp16"},
    {"main_params_dtype": "fp16"},
    {"main_grads_dtype": "bf16", "accumulate_allreduce_grads_in_fp32": False},
]


@pytest.mark.parametrize("formats", FORMATS)
def test_a_resumed_run_is_equal(monkeypatch: pytest.MonkeyPatch, formats: dict[str, Any]) -> None:
    with model_parallel():
        chunks, optimizer = _build(monkeypatch, **PRECISION_AWARE, **formats)
        _steps(chunks, optimizer, [1, 2])
        saved = _saved(chunks, optimizer)
        assert all(value.dtype == torch.float32 for value in [*saved.values()][:-1])
        others, other = _build(monkeypatch, **PRECISION_AWARE, **formats)
        others[0].load_state_dict(chunks[0].state_dict())
        _load(others, other, saved)
        for each in ((chunks, optimizer), (others, other)):
            _steps(*each, [3])
        first, second = chunks[0].state_dict(), others[0].state_dict()
        for name, value in first.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, second[name]), name
        after, again = _saved(chunks, optimizer), _saved(others, other)
        assert all(map(torch.equal, after.values(), again.values()))


def test_checkpoints_do_not_depend_on_the_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain state loads into precision-aware state and back without a change."""
    with model_parallel():
        chunks, plain = _build(monkeypatch)
        _steps(chunks, plain, [1, 2])
        saved = _saved(chunks, plain)
        others, aware = _build(monkeypatch, **PRECISION_AWARE)
        others[0].load_state_dict(chunks[0].state_dict())
        _load(others, aware, saved)
        found = _saved(others, aware)
        for value, expected in zip(found.values(), saved.values(), strict=True):
            torch.testing.assert_close(value, expected, rtol=2**-23, atol=0)
        _load(chunks, plain, found)
        assert all(map(torch.equal, _saved(chunks, plain).values(), found.values()))


def test_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with model_parallel():
        chunks, optimizer = _build(monkeypatch, **PRECISION_AWARE)
        *values, step = _saved(chunks, optimizer).values()
        assert step.item() == 0
        parameters = {id(p): p for p in chunks[0].parameters()}
        assert len(values) == 3 * len(parameters)
        assert all(not value.any() for value in values[0::3] + values[1::3])
        total = sum(float(p.detach().float().sum()) for p in parameters.values())
        assert sum(float(value.sum()) for value in values[2::3]) == pytest.approx(total, rel=1e-5)
