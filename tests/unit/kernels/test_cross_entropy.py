"""The cross-entropy kernels in Triton, against float64 and megatron-core."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from moetron.moe.kernels import cross_entropy as module
from moetron.moe.kernels.availability import uses_triton
from moetron.moe.kernels.cross_entropy import cross_entropy
from tests.parallel.support.harness import model_parallel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not uses_triton(torch.empty(0, device=DEVICE)),
    reason="needs a GPU, or Triton's interpreter: test_attention_kernels_interpreted.py",
)


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def _sizes(*shape: int) -> torch.Tensor:
    """Return random weights, 0 for the last token: of a loss that the mask drops."""
    weights = torch.randn(shape)
    weights[-1, -1] = 0
    return weights


@pytest.mark.parametrize("rows", [1, 7, 4096, 5001])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_losses_and_gradients_equal_float64(rows: int, scale: float) -> None:
    torch.manual_seed(rows)
    hidden = torch.randn(3, 2, rows, requires_grad=True)
    labels = torch.randint(rows, (3, 2))
    of_loss, of_z = _sizes(3, 2), _sizes(3, 2) / scale
    losses, log_z = cross_entropy(hidden * scale, labels)
    (losses * of_loss + log_z.square() * of_z).sum().backward()
    exact = hidden.detach().double().requires_grad_()
    logits = exact * scale
    expected_z = logits.logsumexp(-1)
    expected = expected_z - logits.gather(-1, labels[..., None]).squeeze(-1)
    (expected * of_loss + expected_z.square() * of_z).sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(log_z.double(), expected_z, rtol=1e-5, atol=1e-5)
    assert hidden.grad is not None and exact.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * scale)
    assert not hidden.grad[-1, -1].any()


def test_bf16_logits_give_fp32_losses_and_a_bf16_gradient_of_the_same_rounding() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 2, 301).bfloat16().requires_grad_()
    labels = torch.randint(301, (4, 2))
    losses, _ = cross_entropy(hidden * 1, labels)
    losses.sum().backward()
    twin = hidden.detach().clone().requires_grad_()
    with model_parallel():
        theirs = vocab_parallel_cross_entropy(twin * 1, labels)
        theirs.sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, theirs, rtol=1e-5, atol=1e-5)
    assert hidden.grad is not None and twin.grad is not None
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=2**-7, atol=1e-6)


def test_a_row_without_gradient_is_not_read() -> None:
    hidden = torch.randn(2, 1, 5, requires_grad=True)
    scale = torch.tensor([[[torch.inf]], [[1.0]]])
    losses, _ = cross_entropy(hidden * scale, torch.zeros(2, 1, dtype=torch.long))
    logits_grad = torch.autograd.grad(losses[1].sum(), hidden)[0]
    assert logits_grad.isnan()[0].all()  # 0 x inf, of the product alone
    assert logits_grad[1].isfinite().all()


def test_a_gradient_that_is_not_a_number_stays_so() -> None:
    logits = torch.randn(2, 1, 5, requires_grad=True)
    losses, _ = cross_entropy(logits, torch.zeros(2, 1, dtype=torch.long))
    (losses * torch.tensor([[torch.nan], [1.0]])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isnan().any(-1).flatten().tolist() == [True, False]


def test_the_forward_pass_and_leaves_keep_their_values() -> None:
    logits = torch.randn(3, 2, 9, requires_grad=True)
    before, labels = logits.detach().clone(), torch.randint(9, (3, 2))
    with torch.no_grad():
        assert not cross_entropy(logits, labels)[0].requires_grad
    cross_entropy(logits, labels)[0].sum().backward()
    assert torch.equal(logits.detach(), before)


def test_the_gradient_takes_the_memory_of_the_logits() -> None:
    hidden = torch.randn(3, 2, 9, requires_grad=True)
    logits = hidden * 1
    seen: list[int] = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    cross_entropy(logits, torch.zeros(3, 2, dtype=torch.long))[0].sum().backward()
    assert seen == [logits.data_ptr()]


@pytest.mark.parametrize("again", ["kernel", "product"])
def test_values_that_were_overwritten_are_refused(again: str) -> None:
    hidden = torch.randn(3, 2, 9, requires_grad=True)
    logits = hidden * 1
    labels = torch.zeros(3, 2, dtype=torch.long)
    losses, _ = cross_entropy(logits, labels)
    other = losses if again == "kernel" else logits.square()
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


def test_two_ranks_with_half_the_vocabulary_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's part, then the parts with their reductions replaced by both ranks' values."""
    torch.manual_seed(2)
    logits, labels = torch.randn(3, 2, 10) * 5, torch.randint(10, (3, 2))
    halves = [half.clone().requires_grad_() for half in logits.split(5, -1)]
    group: list[Any] = [SimpleNamespace(rank=lambda r=r: r, size=lambda: 2) for r in (0, 1)]
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "_combine", lambda *args: parts.append(args[:2]) or args[:2])
        for half, rank in zip(halves, group, strict=True):
            cross_entropy(half, labels, rank)
    both = [[part[0] for part in parts]]
    largest = torch.stack(both[0]).amax(0)
    both.append([torch.stack([(z - largest).exp(), label]) for z, label in parts])
    for number, (half, rank) in enumerate(zip(halves, group, strict=True)):
        sums = iter([largest, sum(both[1])])
        monkeypatch.setattr(module, "all_reduce", lambda x, sums=sums, **_: x.copy_(next(sums)))
        losses, log_z = cross_entropy(half, labels, rank)
        expected_z = logits.logsumexp(-1)
        torch.testing.assert_close(log_z, expected_z)
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        ).view(3, 2)
        torch.testing.assert_close(losses, expected)
        losses.sum().backward()
        wanted = logits.softmax(-1) - torch.nn.functional.one_hot(labels, 10)
        assert half.grad is not None
        torch.testing.assert_close(half.grad, wanted.split(5, -1)[number])
