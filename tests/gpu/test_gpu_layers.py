"""On the device of this machine: experts without tokens, attention's masks, random routers."""

import math
import re

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.testing import assert_close

from moetron.moe.config.command import load
from moetron.moe.layers.attention import SdpaAttention, prefix_mask
from moetron.moe.training.trainer import Trainer
from tests.gpu.devices import device, kind_fault
from tests.gpu.gpu_cases import KINDS, OLMOE
from tests.gpu.in_process import built

pytestmark = pytest.mark.gpu

EXPERTS = 16  # of the tiny OLMoE


def _argv(kind: str, *more: str) -> list[str]:
    return [*OLMOE, *KINDS[kind].flags, "--mock-data", "--eval-iters", "0", *more]


def _moe_layer(trainer: Trainer) -> MoELayer:
    return next(m for m in trainer.chunks[0].modules() if isinstance(m, MoELayer))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("params")])
def test_experts_without_tokens(kind: str) -> None:
    """All idle (a rank that got no token), some idle, and each one alone: no trace of the idle."""
    if fault := kind_fault(KINDS[kind].te, KINDS[kind].capability):
        pytest.skip(fault)
    counts_E = torch.zeros(EXPERTS, dtype=torch.int64)
    with built(load(_argv(kind)).settings) as trainer:
        experts, config = _moe_layer(trainer).experts, trainer.config
        generator = torch.Generator(device()).manual_seed(1)

        def run(counts: list[int], rows: torch.Tensor) -> torch.Tensor:
            trainer.chunks[0].zero_grad_buffer()
            probabilities = torch.full((len(rows),), 0.25, device=device())
            x = rows.clone().requires_grad_()
            with get_fp8_context(config, 0):
                out, _ = experts(x, torch.tensor(counts), probabilities)
            assert out.shape == rows.shape
            (1e3 * out.float().square().sum()).backward()  # above the least e5m2
            for name, parameter in experts.named_parameters():
                grad = parameter.main_grad
                single = re.search(r"(?:weight|local_experts\.)(\d+)", name.split(".", 1)[-1])
                by_expert = grad if grad.dim() == 3 else {int(single[1]): grad}
                for expert in range(EXPERTS) if grad.dim() == 3 else by_expert:
                    touched = bool(by_expert[expert].any())
                    assert touched == (counts[expert] > 0), f"{name}, expert {expert}"
            return out.detach().float()

        def rows(count: int) -> torch.Tensor:
            shape = (count, config.hidden_size)
            drawn = torch.randn(shape, generator=generator, device=device())
            return drawn.to(config.params_dtype)

        run(counts_E.tolist(), rows(0))
        some = counts_E.clone()
        some[[1, 4, 15]] = torch.tensor([5, 1, 18])
        inputs = rows(24)
        together = run(some.tolist(), inputs)
        start = 0
        for expert in (1, 4, 15):
            alone, count = counts_E.clone(), int(some[expert])
            alone[expert] = count
            own = run(alone.tolist(), inputs[start : start + count])
            # Delayed scales change between calls, and the first are 1.
            bound = 0.3 if "--fp8-format" in KINDS[kind].flags else 1e-2
            assert (together[start : start + count] - own).norm() < bound * own.norm()
            start += count


def _assert_near(
    found: torch.Tensor,
    inputs: list[torch.Tensor],
    expected: torch.Tensor,
    exact: list[torch.Tensor],
) -> None:
    """Compare outputs and gradients of their inputs with those in fp64, by the inputs' dtype."""
    weights = torch.randn_like(expected)
    (found.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    bound = 1e-4 if found.dtype == torch.float32 else 5e-2
    assert_close(found.double(), expected, atol=bound, rtol=bound)
    for mine, true in zip(inputs, exact, strict=True):
        assert mine.grad is not None and true.grad is not None
        assert_close(mine.grad.double(), true.grad, atol=2 * bound, rtol=bound)


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forbidden: torch.Tensor
) -> torch.Tensor:
    """Return attention with the s x s matrix; arguments [s, b, heads, width], bool [b, 1, s, s]."""
    shared = q.shape[2] // k.shape[2]
    k, v = (tensor.repeat_interleave(shared, dim=2) for tensor in (k, v))
    logits = torch.einsum("qbhc,kbhc->bhqk", q, k) / math.sqrt(q.shape[3])
    weights = logits.masked_fill(forbidden, -math.inf).softmax(-1)
    return torch.einsum("bhqk,kbhc->qbhc", weights, v).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "prefix"])
@pytest.mark.parametrize("value_width", [16, 24])
def test_attention(dtype: torch.dtype, groups: int, masked: bool, value_width: int) -> None:
    """Grouped queries, bidirectional prefixes, values of another width: output and gradients."""
    length, batch = 40, 3
    torch.manual_seed(0)
    shapes = [(8, 16), (groups, 16), (groups, value_width)]
    inputs = [torch.randn(length, batch, *shape, device=device(), dtype=dtype) for shape in shapes]
    prefix_B = torch.tensor([0, 7, 40] if masked else [0, 0, 0], device=device())
    mask = prefix_mask(prefix_B, length)
    with built(load(_argv("local")).settings) as trainer:
        attention = SdpaAttention(trainer.config, 1, AttnMaskType.causal, "self")
        ours = [tensor.clone().requires_grad_() for tensor in inputs]
        exact = [tensor.double().requires_grad_() for tensor in inputs]
        found = attention(*ours, mask if masked else None)
        expected = _explicit(*exact, mask)
        _assert_near(found, ours, expected, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value_width", [24, 16])
def test_attention_of_the_last_positions(dtype: torch.dtype, value_width: int) -> None:
    """Part of a sequence sees the keys of all of it, as with context parallelism; gradients too."""
    length, first = 40, 24
    torch.manual_seed(0)
    widths = (24, 24, value_width)
    inputs = [torch.randn(length, 2, 4, w, device=device(), dtype=dtype) for w in widths]
    mask = prefix_mask(torch.tensor([0, 0], device=device()), length)
    with built(load(_argv("local")).settings) as trainer:
        attention = SdpaAttention(trainer.config, 1, AttnMaskType.causal, "self")
        attention.softmax_scale = 1 / math.sqrt(24)
        ours = [tensor.clone().requires_grad_() for tensor in inputs]
        exact = [tensor.double().requires_grad_() for tensor in inputs]
        found = attention._attend(ours[0][first:], *ours[1:], causal=True)
        expected = _explicit(*exact, mask)[first:]
        _assert_near(found, ours, expected, exact)


def test_routers_draw_numbers_of_a_distribution() -> None:
    """On the device, from (seed, layer, micro-batch); tests.gpu.compare draws on the host."""
    flags = ("--moe-router-type", "gumbel")
    with built(load(_argv("local", *flags)).settings) as trainer:
        draws = _moe_layer(trainer).router.draws
        like = torch.empty(256, 4, EXPERTS, device=device())
        draws.start(1)
        uniform, normal, gumbel = draws.uniform(like), draws.normal(like), draws.gumbel(like)
        number = draws.number
        draws.start(1)
        later = draws.uniform(like)
    assert draws.number == number + 1
    for drawn in (uniform, normal, gumbel, later):
        assert drawn.device.type == device().type and drawn.shape == like.shape
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert uniform.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    assert normal.mean().item() == pytest.approx(0, abs=0.05)
    assert normal.std().item() == pytest.approx(1, abs=0.05)
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.06)
    assert not torch.equal(uniform, later)
