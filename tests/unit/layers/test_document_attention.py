"""Attention inside documents against a dense mask: outputs and gradients."""

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from moetron.moe.layers import attention, attention_kernels, document_attention
from moetron.moe.layers.attention import SdpaAttention
from moetron.moe.layers.document_attention import (
    Piece,
    attend_in_documents,
    document_lengths,
    packed_parameters,
    pieces,
    places_in_documents,
)
from tests.parallel.support.harness import model_parallel

HEADS, WIDTH = 4, 8


@pytest.fixture(autouse=True, scope="module")
def _parallel_state() -> Iterator[None]:
    with model_parallel():
        yield


def _attention() -> SdpaAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, attention_dropout=0.0
    )
    return SdpaAttention(config, 1, AttnMaskType.causal, "self")


def _cu_seqlens(rows: list[list[int]]) -> torch.Tensor:
    """Return the ends of documents, with empty ones at the end, as from the loader."""
    ends = torch.tensor([0, *(n for row in rows for n in row), 0, 0]).cumsum(0)
    return ends.to(torch.int32)


def _dense_mask(rows: list[list[int]]) -> torch.Tensor:
    """Return the forbidden pairs, bool [b, 1, S, S]."""
    number_BS = torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows])
    same = number_BS[:, :, None] == number_BS[:, None, :]
    return ~(same & torch.ones_like(same[0]).tril())[:, None]


def _qkv(length: int, batch: int, groups: int, value_width: int) -> list[torch.Tensor]:
    shapes = [(HEADS, WIDTH), (groups, WIDTH), (groups, value_width)]
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(length, batch, *shape, generator=generator).requires_grad_() for shape in shapes
    ]


def _with_gradients(out: torch.Tensor, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), qkv)]


ROWS = st.lists(st.integers(0, 39), max_size=6).map(
    lambda cuts: [b - a for a, b in zip([0, *cuts_of(cuts)], [*cuts_of(cuts), 40], strict=True)]
)
"""Lengths of the documents in 40 tokens."""


def cuts_of(numbers: list[int]) -> list[int]:
    return sorted({n for n in numbers if n})


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=3), groups=st.sampled_from([4, 2]), wide=st.booleans()
)
def test_equals_the_dense_mask(rows: list[list[int]], groups: int, wide: bool) -> None:
    qkv = _qkv(40, len(rows), groups, 2 * WIDTH if wide else WIDTH)
    module = _attention()
    ours = _with_gradients(module(*qkv, _cu_seqlens(rows)), qkv)
    dense = _with_gradients(module(*qkv, _dense_mask(rows)), qkv)
    for mine, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_documents_of_one_token_return_their_value() -> None:
    qkv = _qkv(3, 1, HEADS, WIDTH)
    out = _attention()(*qkv, _cu_seqlens([[1, 1, 1]]))
    torch.testing.assert_close(out, qkv[2].flatten(2))


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=2), rank=st.integers(0, 1))
def test_chunks_of_a_context_rank_equal_their_rows(rows: list[list[int]], rank: int) -> None:
    """Ranges of two of four chunks, as two context ranks have them."""
    ranges = [(10 * chunk, 10 * chunk + 10) for chunk in (rank, 3 - rank)]
    own = torch.cat([torch.arange(*each) for each in ranges])
    qkv, module, ends = _qkv(40, len(rows), HEADS, WIDTH), _attention(), _cu_seqlens(rows)
    query, key, value = qkv
    ours = attend_in_documents(module._attend, query[own], key, value, ends, ranges)
    whole = module(*qkv, ends)[own]
    for mine, expected in zip(_with_gradients(ours, qkv), _with_gradients(whole, qkv), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*kernel not used")  # torch says so of a CPU
@pytest.mark.parametrize("wide", [False, True])
def test_chunks_without_a_mask_in_memory(monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    """With the mask of a GPU, which torch makes on a CPU after all."""
    gpu = torch.device("cuda")
    assert attention_kernels.causal_mask(2**13, 2**17, gpu).numel() == 0
    made = []

    def on_gpu(queries: int, keys: int, _: torch.device) -> torch.Tensor:
        made.append((queries, keys))
        return attention_kernels.causal_mask(queries, keys, gpu)

    ranges = [(10, 20), (20, 30)]  # of the second of two context ranks
    qkv, module = _qkv(40, 2, HEADS, 2 * WIDTH if wide else WIDTH), _attention()
    query, key, value = qkv
    whole = module(*qkv, _cu_seqlens([[40], [40]]))[10:30]
    monkeypatch.setattr(attention, "causal_mask", on_gpu)
    cut = [module._attend(query[a:b], key[:b], value[:b], causal=True) for a, b in ranges]
    assert made == [(10, 20), (10, 30)]
    pairs = zip(_with_gradients(torch.cat(cut), qkv), _with_gradients(whole, qkv), strict=True)
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_short_documents_of_equal_length_share_a_call() -> None:
    calls: list[tuple[int, ...]] = []

    def attend(query: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(tuple(query.shape[:2]))
        return query.flatten(2)

    rows = [[4, 4, 8, 4], [20]]
    query = _qkv(20, 2, HEADS, WIDTH)[0]
    out = attend_in_documents(attend, query, query, query, _cu_seqlens(rows), [(0, 20)])
    assert sorted(calls) == [(4, 3), (8, 1), (20, 1)]
    assert torch.equal(out, query.flatten(2))  # everything is back in its place


def test_long_documents_have_calls_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, "OWN_CALL", 4)
    rows = [[4, 4, 8, 3, 1], [3, 17]]
    qkv, module = _qkv(20, 2, HEADS, WIDTH), _attention()
    ours = _with_gradients(module(*qkv, _cu_seqlens(rows)), qkv)
    dense = _with_gradients(module(*qkv, _dense_mask(rows)), qkv)
    for mine, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_worked_examples() -> None:
    ends = _cu_seqlens([[2, 3], [5]])
    assert document_lengths(ends, 2) == [[2, 3], [5]]
    assert places_in_documents(ends, 2, 5).tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert pieces([2, 6, 4], 4, 10) == [Piece(4, 6), Piece(2, 2)]
    packed = packed_parameters(ends, 5)
    assert packed.qkv_format == "thd" and packed.cu_seqlens_q is ends and packed.max_seqlen_q == 5


@pytest.mark.parametrize("value_width", [WIDTH, WIDTH - 3])
def test_arguments_of_torchs_kernel(monkeypatch: pytest.MonkeyPatch, value_width: int) -> None:
    """A stand-in with its signature; the kernel itself needs a GPU."""

    def varlen(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: Any,
        *others: Any,
        **options: Any,
    ) -> torch.Tensor:
        assert options["window_size"] == (-1, 0) and options["scale"] == pytest.approx(WIDTH**-0.5)
        assert ends is others[0] and others[1:] == (20, 20)
        assert value.shape == key.shape  # as in latent attention after filling up
        rows = [x[:, None] for x in (query, key, value)]
        lengths = [[n for row in document_lengths(ends, 2) for n in row]]
        out: torch.Tensor = plain(*rows, _cu_seqlens(lengths))
        return out.view_as(value)

    module, plain = _attention(), _attention()
    qkv, ends = _qkv(20, 2, 2, value_width), _cu_seqlens([[4, 16], [1, 19]])
    expected = module(*qkv, ends)
    calls = iter([varlen])  # the stand-in itself computes on the host
    monkeypatch.setattr(attention, "varlen_kernel", lambda *_: next(calls, None))
    torch.testing.assert_close(module(*qkv, ends), expected)


@pytest.mark.parametrize(
    ("widths", "serves"),
    [((128, 128), True), ((192, 128), True), ((12, 12), False), ((264, 264), False)],
)
def test_widths_of_torchs_kernel(widths: tuple[int, int], serves: bool) -> None:
    """FlashAttention refuses others, with an error: pytorch's flash_api.cpp."""
    query, value = (
        SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(4, 1, 2, width))
        for width in widths
    )
    assert (document_attention.varlen_kernel(query, value) is not None) == serves  # type: ignore[arg-type]


def test_no_kernel_that_plans_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU cuDNN's is left to calls of one shape: of full sequences, in training."""
    original, excluded = SdpaAttention._kernels, []

    def on_gpu(module: SdpaAttention, _: torch.Tensor, *options: Any) -> nullcontext[None]:
        found = original(module, SimpleNamespace(is_cuda=True), *options)
        excluded.append(not isinstance(found, nullcontext))
        return nullcontext()

    monkeypatch.setattr(SdpaAttention, "_kernels", on_gpu)
    module, qkv = _attention(), _qkv(20, 1, HEADS, WIDTH)
    module(*qkv, None)
    assert excluded == [False]
    module(*qkv, _cu_seqlens([[4, 16]]))
    assert excluded == [False, True, True]
    module.eval()(*qkv, None)
    assert excluded[3:] == [True]
