"""Our core attention against megatron-core's ``DotProductAttention``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from moetron.moe.layers import attention_kernels
from moetron.moe.layers.attention import SdpaAttention, prefix_mask, repeat_heads
from tests.parallel.support.harness import model_parallel


@pytest.fixture(autouse=True)
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _config(groups: int = 4, **changes: Any) -> TransformerConfig:
    values = {"attention_dropout": 0.0, "masked_softmax_fusion": False, **changes}
    return TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=groups, **values
    )


def _qkv(sq: int = 9, sk: int = 9, groups: int = 4) -> list[torch.Tensor]:
    shapes = [(sq, 2, 4, 8), (sk, 2, groups, 8), (sk, 2, groups, 8)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def _outputs_and_gradients(
    module: torch.nn.Module, qkv: list[torch.Tensor], mask: torch.Tensor | None, **options: Any
) -> list[torch.Tensor]:
    out = module(*qkv, mask, **options)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), qkv)]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kind", ["causal", "none", "given"])
def test_equals_dot_product_attention(groups: int, scale: float | None, kind: str) -> None:
    mask_type = AttnMaskType.no_mask if kind == "none" else AttnMaskType.causal
    mask = None
    if kind == "given":  # two documents: [b, 1, sq, sk], True is forbidden
        document = torch.tensor([0] * 4 + [1] * 5)
        same = document[:, None] == document[None, :]
        mask = ~(same & torch.ones(9, 9).tril().bool()).expand(2, 1, 9, 9)
    qkv = _qkv(groups=groups)
    ours, theirs = (
        _outputs_and_gradients(
            kind_of(_config(groups), 1, mask_type, "self", softmax_scale=scale), qkv, mask
        )
        for kind_of in (SdpaAttention, DotProductAttention)
    )
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_one_query_sees_the_whole_cache() -> None:
    query, key, value = _qkv(sq=1, sk=6)
    ours = SdpaAttention(_config(), 1, AttnMaskType.causal, "self")
    theirs = DotProductAttention(_config(), 1, AttnMaskType.no_mask, "self")
    torch.testing.assert_close(ours(query, key, value, None), theirs(query, key, value, None))


def test_a_call_can_pass_its_own_mask() -> None:
    query, key, value = _qkv()
    causal = SdpaAttention(_config(), 1, AttnMaskType.causal, "self")
    free = SdpaAttention(_config(), 1, AttnMaskType.no_mask, "self")
    out = causal(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
    assert torch.equal(out, free(query, key, value, None))
    assert not torch.equal(out, causal(query, key, value, None))


def test_dropout_draws_from_the_tensor_parallel_state() -> None:
    attention = SdpaAttention(_config(attention_dropout=0.5), 1, AttnMaskType.causal, "self")
    qkv, state = _qkv(), torch.get_rng_state()
    first, second = attention(*qkv, None), attention(*qkv, None)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, second)
    attention.eval()
    assert torch.equal(attention(*qkv, None), attention(*qkv, None))


def test_dropout_keeps_the_mean() -> None:
    attention = SdpaAttention(_config(attention_dropout=0.2), 1, AttnMaskType.causal, "self")
    qkv = _qkv()
    mean = torch.stack([attention(*qkv, None) for _ in range(1000)]).mean(0)
    torch.testing.assert_close(mean, attention.eval()(*qkv, None), rtol=0, atol=0.15)


@pytest.mark.parametrize("changes", [{"window_size": (4, 0)}, {"softmax_type": "learnable"}])
def test_rejects_unsupported_configurations(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no sliding window and no sink"):
        SdpaAttention(_config(**changes), 1, AttnMaskType.causal, "self")


def test_a_prefix_is_bidirectional_and_the_rest_causal() -> None:
    forbidden = prefix_mask(torch.tensor([0, 3]), 4)
    assert forbidden.shape == (2, 1, 4, 4)
    allowed = (~forbidden[:, 0]).int().tolist()
    assert allowed[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert allowed[1] == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_attention_with_a_prefix_mask_equals_explicit_softmax() -> None:
    query, key, value = (x.detach() for x in _qkv())
    forbidden = prefix_mask(torch.tensor([1, 5]), 9)
    out = SdpaAttention(_config(), 1, AttnMaskType.causal, "self")(query, key, value, forbidden)
    scores = torch.einsum("qbhw,kbhw->bhqk", query, key) / 8**0.5
    weights = scores.masked_fill(forbidden, -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,kbhw->qbhw", weights, value).flatten(2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_repeated_keys_equal_shared_ones(groups: int) -> None:
    """What a GPU gets in place of ``enable_gqa``: the query heads of a group are neighbours."""
    query, key, value = _qkv(groups=groups)
    results = []
    for shared in (True, False):
        keys, values = (x if shared else repeat_heads(x, 4) for x in (key, value))
        out = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (query, keys, values)),
            is_causal=True,
            enable_gqa=shared,
        )
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [query, key, value])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_cudnn_comes_first_but_in_deterministic_runs() -> None:
    assert attention_kernels.preferred()[0] == SDPBackend.CUDNN_ATTENTION
    try:
        torch.use_deterministic_algorithms(True)
        assert SDPBackend.CUDNN_ATTENTION not in attention_kernels.preferred()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_preference_replaces_the_one_before_and_can_be_undone() -> None:
    def current() -> list[SDPBackend]:
        found: list[SDPBackend] = _cur_sdpa_kernel_backends(with_priority=True)
        return found

    before = current()
    try:
        attention_kernels.prefer(attention_kernels.WITHOUT_CUDNN)
        attention_kernels.prefer(attention_kernels.WITH_CUDNN)
        assert current() == attention_kernels.WITH_CUDNN
        attention_kernels.prefer(attention_kernels.WITHOUT_CUDNN)
        assert current() == attention_kernels.WITHOUT_CUDNN
    finally:
        attention_kernels.reset_preference()
    assert current() == before
