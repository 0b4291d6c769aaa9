"""The rotary kernel in Triton, against megatron-core in float64."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from moetron.moe.kernels import rotary as module
from moetron.moe.kernels.availability import uses_triton
from moetron.moe.kernels.rotary import PairLayout, rotary, rotation_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not uses_triton(torch.empty(0, device=DEVICE)),
    reason="needs a GPU, or Triton's interpreter: test_attention_kernels_interpreted.py",
)
HALVES, NEIGHBOURS = PairLayout(False, False), PairLayout(True, True)
LATENT = PairLayout(True, False)


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def _angles(length: int, rotated: int, layout: PairLayout) -> torch.Tensor:
    one = torch.rand(length, 1, 1, rotated // 2) * 50
    both = (one, one)
    return torch.stack(both, -1).flatten(-2) if layout.target_interleaved else torch.cat(both, -1)


@pytest.mark.parametrize("layout", [HALVES, NEIGHBOURS, LATENT])
@pytest.mark.parametrize(
    ("shape", "rotated"),
    [((5, 2, 3, 12), 12), ((4, 1, 5, 20), 12), ((3, 2, 16, 8), 8), ((1, 3, 1, 2), 2)],
)
def test_equals_megatron(
    layout: PairLayout, shape: tuple[int, int, int, int], rotated: int
) -> None:
    torch.manual_seed(1)
    width = shape[-1]
    joint = torch.randn(*shape[:-1], 3 * width)
    x = joint[..., width : 2 * width].requires_grad_()  # a slice, as of a joint projection
    exact = x.detach().double().requires_grad_()
    angles = _angles(shape[0], rotated, layout)
    y = rotary(x, angles, layout, 1.3)
    expected = _apply_rotary_pos_emb_bshd(
        exact, angles.double(), layout == NEIGHBOURS, layout == LATENT, 1.3
    )
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(y)
    grad = torch.autograd.grad((y * weights).sum(), x)[0]
    wanted = torch.autograd.grad((expected * weights.double()).sum(), exact)[0]
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_many_heads_take_several_programs() -> None:
    x = torch.randn(2, 1, 40, 256)
    angles = _angles(2, 256, HALVES)
    expected = _apply_rotary_pos_emb_bshd(x, angles)
    torch.testing.assert_close(rotary(x, angles, HALVES), expected, rtol=1e-5, atol=1e-5)


def test_bf16_is_rotated_in_fp32() -> None:
    x, angles = torch.randn(3, 2, 2, 8).bfloat16(), _angles(3, 8, HALVES)
    expected = _apply_rotary_pos_emb_bshd(x.float(), angles).bfloat16()
    torch.testing.assert_close(rotary(x, angles, HALVES), expected, rtol=2**-7, atol=1e-6)
    assert rotary(x, angles, HALVES).is_contiguous()


def test_gradients_of_any_strides() -> None:
    x, angles = torch.randn(3, 2, 2, 8, requires_grad=True), _angles(3, 8, HALVES)
    rotary(x, angles, HALVES).sum().backward()  # a gradient of strides 0
    twin = x.detach().clone().requires_grad_()
    _apply_rotary_pos_emb_bshd(twin, angles).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_tables_live_as_long_as_their_angles() -> None:
    angles = _angles(3, 8, HALVES)
    table = rotation_table(angles)
    assert rotation_table(angles) is table
    count = len(module._tables)
    del angles
    assert len(module._tables) == count - 1
