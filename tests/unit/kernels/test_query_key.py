"""The kernels of queries and keys in Triton, against float64."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from moetron.moe.kernels import query_key as module
from moetron.moe.kernels.availability import uses_triton
from moetron.moe.kernels.query_key import HeadLayout, query_key
from moetron.moe.kernels.rotary import rotation_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not uses_triton(torch.empty(0, device=DEVICE)),
    reason="needs a GPU, or Triton's interpreter: test_attention_kernels_interpreted.py",
)
EPSILON = 1e-3
CASES = [  # s, b, key heads, queries of each, head width, rotated; interleaved; tokens of a program
    ((5, 2, 3, 1, 12, 12), False, 4),
    ((4, 1, 2, 3, 20, 12), True, 1),
    ((3, 2, 1, 4, 8, 8), False, 1),
    ((2, 1, 1, 1, 4, 2), False, 2),
]


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    torch.manual_seed(1)
    with torch.device(DEVICE):
        yield


def _angles(length: int, rotated: int, interleaved: bool) -> torch.Tensor:
    one = torch.rand(length, 1, 1, rotated // 2) * 50
    return torch.stack((one, one), -1).flatten(-2) if interleaved else torch.cat((one, one), -1)


def _expected(
    mixed: torch.Tensor,
    weights: list[torch.Tensor],
    angles: torch.Tensor,
    layout: HeadLayout,
    scale: float,
) -> list[torch.Tensor]:
    """Return queries, keys and values by operations of torch and megatron-core."""
    s, b, _, row = mixed.shape
    width = layout.width
    parts = mixed.split([row - 2 * width, width, width], -1)
    heads = [part.reshape(s, b, -1, width) for part in parts]
    for number, weight in enumerate(weights):
        x = heads[number]
        flat = x.flatten(2) if layout.full_width else x
        heads[number] = F.rms_norm(flat, weight.shape, weight, layout.epsilon).view_as(x)
    rotated = [
        _apply_rotary_pos_emb_bshd(x, angles, layout.interleaved, mscale=scale) for x in heads[:2]
    ]
    return [*rotated, heads[2]]


@pytest.mark.parametrize(("shape", "interleaved", "steps"), CASES)
@pytest.mark.parametrize("norm", ["none", "head", "full"])
def test_equals_the_separate_operations(
    shape: tuple[int, ...],
    interleaved: bool,
    steps: int,
    norm: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s, b, groups, shared, width, rotated = shape
    monkeypatch.setattr(module, "PROGRAMS", -(-s * b // steps))
    monkeypatch.setattr(module, "TILE", 16)  # several blocks of heads
    layout = HeadLayout(width, interleaved, norm != "none", norm == "full", EPSILON)
    mixed = torch.randn(s, b, groups, (shared + 2) * width).requires_grad_()
    sizes = [groups * shared * width, groups * width] if norm == "full" else [width, width]
    weights = [(torch.rand(n) + 0.5).requires_grad_() for n in sizes] if norm != "none" else []
    angles = _angles(s, rotated, interleaved)
    ours = query_key(mixed, *(weights or (None, None)), rotation_table(angles, 1.3), layout)
    exact = [x.detach().double().requires_grad_() for x in (mixed, *weights)]
    expected = _expected(exact[0], exact[1:], angles.double(), layout, 1.3)
    slopes = [torch.randn(x.shape) for x in expected]
    grads = torch.autograd.grad(
        sum((x * slope).sum() for x, slope in zip(ours, slopes, strict=True)), [mixed, *weights]
    )
    wanted = torch.autograd.grad(
        sum((x * slope).sum() for x, slope in zip(expected, slopes, strict=True)), exact
    )
    for one, other in zip((*ours, *grads), (*expected, *wanted), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_gradients_of_any_strides_and_values_that_nothing_uses() -> None:
    layout = HeadLayout(8, False, True, False, EPSILON)
    mixed, angles = torch.randn(3, 2, 2, 32, requires_grad=True), _angles(3, 8, False)
    weights = [torch.ones(8, requires_grad=True) for _ in range(2)]
    query, key, _ = query_key(mixed, *weights, rotation_table(angles), layout)
    (query.sum() + key.permute(1, 2, 3, 0).square().sum()).backward()
    twin = mixed.detach().clone().requires_grad_()
    query, key, _ = _expected(twin, weights, angles, layout, 1.0)
    (query.sum() + key.square().sum()).backward()
    torch.testing.assert_close(mixed.grad, twin.grad, rtol=1e-4, atol=1e-5)


def test_bf16_in_bf16_out_with_one_rounding() -> None:
    layout = HeadLayout(8, False, True, True, EPSILON)
    mixed, angles = torch.randn(3, 2, 2, 24).bfloat16(), _angles(3, 8, False)
    weights = [torch.rand(16).bfloat16() for _ in range(2)]
    expected = _expected(mixed.float(), [w.float() for w in weights], angles, layout, 1.0)
    for ours, wanted in zip(
        query_key(mixed, *weights, rotation_table(angles), layout), expected, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), wanted, rtol=2**-7, atol=1e-6)
