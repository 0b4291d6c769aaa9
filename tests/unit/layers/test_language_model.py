"""The z-loss of the output: the same losses, the formula's gradient."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moetron.moe.config.bridge import transformer_config
from moetron.moe.layers import language_model
from moetron.moe.layers.build_model import build_model
from moetron.moe.layers.language_model import LanguageModel, label_logits, mean_logits
from tests.parallel.support.checkpoint_runs import VOCABULARY, parallel_of, settings

COEFFICIENT = 0.3
SECOND: Any = SimpleNamespace(rank=lambda: 1)  # of two ranks


def test_label_logits_of_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "reduce_from_tensor_model_parallel_region", lambda x, _: x)
    logits = torch.arange(12.0).view(2, 2, 3)  # [s, b, v]: ids 3, 4, 5
    labels = torch.tensor([[3, 0], [5, 4]])
    assert label_logits(logits, labels, SECOND).tolist() == [[0, 0], [5, 10]]


class _LargestFp32(TorchDispatchMode):
    """Records the number of elements of the largest fp32 tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


def test_the_mean_of_bf16_logits_makes_no_fp32_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256,000 ids such a copy takes 1 MB a token."""
    monkeypatch.setattr(language_model, "reduce_from_tensor_model_parallel_region", lambda x, _: x)
    alone: Any = SimpleNamespace(size=lambda: 1)
    logits = torch.randn(5, 2, 300).bfloat16()
    with _LargestFp32() as seen:
        means = mean_logits(logits, alone)
    torch.testing.assert_close(means, logits.float().mean(-1).T)
    assert seen.numel == means.numel()


def _model(coefficient: float | None) -> LanguageModel:
    changes: dict[str, Any] = {"hidden_dropout": 0.0, "output_z_loss_coeff": coefficient}
    chosen = settings("dp", model=changes, moe={"num_experts": None}, precision={"bf16": False})
    torch.manual_seed(3)
    return build_model(chosen, transformer_config(chosen), VOCABULARY)


def _in_torch(
    logits: torch.Tensor, labels: torch.Tensor, _: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the kernel does."""
    log_z = logits.logsumexp(-1)
    return log_z - logits.gather(-1, labels[..., None]).squeeze(-1), log_z


@pytest.mark.parametrize("has_kernel", [False, True])
def test_gradients_equal_the_formula(has_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_kernel:
        monkeypatch.setattr(language_model, "uses_triton", lambda _: True)
        monkeypatch.setattr(language_model, "cross_entropy", _in_torch)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(VOCABULARY, (2, 2, 16), generator=generator)
    mask = (torch.rand(2, 16, generator=generator) > 0.3).float()
    positions = torch.arange(16).expand(2, -1)
    with parallel_of(settings("dp", moe={"num_experts": None})):
        model = _model(COEFFICIENT)
        losses = model(tokens, positions, None, labels=labels, loss_mask=mask)
        (losses * mask).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        total, count = model.take_squared_log_z().tolist()
        model.zero_grad()
        logits = model(tokens, positions, None).float()
        log_z = logits.logsumexp(-1)
        plain = log_z - logits.gather(-1, labels[..., None]).squeeze(-1)
        ((plain + COEFFICIENT * log_z.square()) * mask).sum().backward()
        torch.testing.assert_close(losses, plain)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
        assert count == mask.sum()
        assert total == pytest.approx(float((log_z.square() * mask).sum()), rel=1e-5)
        assert model.take_squared_log_z().tolist() == [0, 0]


def test_nothing_is_recorded_in_evaluation_or_without_a_coefficient() -> None:
    tokens = torch.arange(32).view(2, 16)
    with parallel_of(settings("dp", moe={"num_experts": None})):
        for model in (_model(None), _model(COEFFICIENT).eval()):
            model(tokens, torch.arange(16).expand(2, -1), None, labels=tokens)
            assert model.take_squared_log_z().tolist() == [0, 0]
