from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from moetron.moe.layers import norm
from moetron.moe.layers.norm import FullWidthRMSNorm, LayerNorm, RMSNorm, rms_norm
from tests.parallel.support.harness import model_parallel, run_ranks


def _config(**changes: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=4, **changes)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 40),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_rms_norm_equals_torch_in_double(
    shape: list[int], width: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(*shape, width) * scale).requires_grad_()
    weight = torch.randn(width, requires_grad=True)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    out = rms_norm(x, weight, 1e-5)
    expected = F.rms_norm(x64, (width,), weight64, 1e-5)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert x.grad is not None and weight.grad is not None and x64.grad is not None
    # The gradient is a difference of two terms of this size.
    size = (grad * weight).abs().max() / (x64.square().mean(-1) + 1e-5).sqrt().min()
    bound = 1e-5 * float(size)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=bound)
    torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=1e-4, atol=1e-5)


def test_bf16_is_computed_in_fp32() -> None:
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    weight = torch.rand(32).bfloat16().requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    expected = F.rms_norm(x.float(), (32,), weight.float(), 1e-5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    out.sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_kernel_for_gpus_equals_ours(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(5, 2, 24).to(dtype).requires_grad_()
    weight = (torch.rand(24) + 0.5).to(dtype).requires_grad_()
    grad, results = torch.randn(5, 2, 24).to(dtype), []
    for has_kernel in (False, True):
        monkeypatch.setattr(norm, "_has_kernel", lambda *_, found=has_kernel: found)
        out = rms_norm(x, weight, 1e-5)
        results.append([out, *torch.autograd.grad((out * grad).sum(), (x, weight))])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.dtype == dtype
        near = 1e-5 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(theirs, ours, rtol=near, atol=near)


def test_torchs_kernel_serves_one_dtype_and_a_whole_width_on_a_gpu() -> None:
    def tensor(dtype: torch.dtype, is_cuda: bool = True) -> Any:
        return SimpleNamespace(dtype=dtype, is_cuda=is_cuda)

    half, single = tensor(torch.bfloat16), tensor(torch.float32)
    one, two = (cast(ProcessGroup, SimpleNamespace(size=lambda n=n: n)) for n in (1, 2))
    assert norm._has_kernel(half, half, None) and norm._has_kernel(single, single, one)
    assert not norm._has_kernel(half, single, None)
    assert not norm._has_kernel(half, half, two)
    assert not norm._has_kernel(tensor(torch.float32, is_cuda=False), single, None)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_parameters_are_marked_if_their_gradients_are_partial(
    kind: type[RMSNorm] | type[LayerNorm], tensor_ranks: int
) -> None:
    parallel = tensor_ranks > 1
    config = _config(tensor_model_parallel_size=tensor_ranks, sequence_parallel=parallel)
    module = kind(config, 8, 1e-5)
    assert [p.sequence_parallel for p in module.parameters()] == [parallel] * len(
        list(module.parameters())
    )


def test_layer_norm_equals_torch() -> None:
    x = torch.randn(3, 8)
    assert torch.equal(LayerNorm(_config(), 8, 1e-3)(x), F.layer_norm(x, (8,), eps=1e-3))


def _full_width(heads: int, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Return one rank's heads of the output and of all gradients of sum(out^3)."""
    ranks = torch.distributed.get_world_size()
    with model_parallel(tensor_model_parallel_size=ranks):
        group = torch.distributed.group.WORLD
        norm = FullWidthRMSNorm(_config(), 4, 1e-5, heads, group)
        rank = group.rank()
        norm.weight.data.copy_(weight.chunk(ranks)[rank])
        part = x.chunk(ranks, dim=2)[rank].clone().requires_grad_()
        out = norm(part)
        (out**3).sum().backward()
        shard = norm.sharded_state_dict(prefix="q.")["q.weight"]
        assert shard.global_shape == (heads * 4,)
        assert shard.global_offset == (rank * heads * 4 // ranks,)
        return [out.detach(), part.grad, norm.weight.grad]


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_width_over_tensor_ranks(ranks: int) -> None:
    x, weight = torch.randn(5, 2, 6, 4), torch.randn(24)
    full, full_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = F.rms_norm(full.flatten(2), (24,), full_weight, 1e-5).view_as(x)
    (expected**3).sum().backward()
    parts = run_ranks(_full_width, ranks, 6, x, weight)
    out, grad = (torch.cat([part[i] for part in parts], dim=2) for i in (0, 1))
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, full.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.cat([part[2] for part in parts]), full_weight.grad, rtol=1e-4, atol=1e-4
    )


def _too_many_ranks() -> str:
    try:
        FullWidthRMSNorm(_config(), 4, 1e-5, 3, torch.distributed.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_must_divide_the_heads() -> None:
    assert "2 tensor ranks do not divide 3 heads" in run_ranks(_too_many_ranks, 2)[0]
