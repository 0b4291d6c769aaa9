"""FP8 scales and rounding, against hand-computed values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetron.moe.config.schema.precision import PrecisionSettings
from moetron.moe.numerics.fp8_emulation import (
    DelayedScale,
    Fp8Numerics,
    Rows,
    block_amax,
    fp8_numerics,
    power_of_two_scale,
    quantize_tokens,
    quantize_weights,
    round_to_fp8,
    scale_of,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ONE = torch.tensor(1.0)


def _rows(*ends: int) -> Rows:
    return Rows(torch.tensor(ends, dtype=torch.int32))


def test_rounding_to_e4m3() -> None:
    """Three bits of mantissa, ties to even, the smallest step 2^-9, saturation at 448."""
    x = torch.tensor([17.0, 19.0, 18.5, 447.0, 500.0, -1e9, 2.0**-9, 2.0**-10, 1.1 * 2.0**-10])
    expected = [16.0, 20.0, 18.0, 448.0, 448.0, -448.0, 2.0**-9, 0.0, 2.0**-9]
    assert round_to_fp8(x, ONE, E4M3).tolist() == expected


def test_rounding_to_e5m2() -> None:
    """Two bits of mantissa, the smallest step 2^-16, saturation at 57344 instead of infinity."""
    x = torch.tensor([9.0, 11.0, 10.5, 1e9, -float("inf"), 2.0**-16, 2.0**-17])
    expected = [8.0, 12.0, 10.0, 57344.0, -57344.0, 2.0**-16, 0.0]
    assert round_to_fp8(x, ONE, E5M2).tolist() == expected
    assert round_to_fp8(torch.tensor(float("nan")), ONE, E5M2).isnan()


def test_scales() -> None:
    amax = torch.tensor([0.0, float("inf"), float("nan"), 1.0, 7.0, 448.0, 449.0, 1e-44])
    largest = torch.finfo(torch.float32).max
    plain = scale_of(amax, E4M3)
    assert plain[:6].tolist() == [1.0, 1.0, 1.0, 448.0, 64.0, 1.0] and plain[7] == largest
    assert float(plain[6]) == pytest.approx(448 / 449)
    # 448 = 1.75 x 2^8: amax 1 may be multiplied by 256, amax 449 must be halved.
    expected = [1.0, 1.0, 1.0, 256.0, 64.0, 1.0, 0.5, 2.0**127]
    assert power_of_two_scale(amax, E4M3).tolist() == expected
    assert power_of_two_scale(torch.tensor([1.0, 57345.0]), E5M2).tolist() == [2.0**15, 0.5]


@settings(deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([E4M3, E5M2]))
def test_a_power_of_two_scale_is_the_largest_that_does_not_saturate(
    amax: float, dtype: torch.dtype
) -> None:
    scale = float(power_of_two_scale(torch.tensor([amax]), dtype))
    limit = torch.finfo(dtype).max
    assert amax * scale <= limit < 2 * amax * scale


def test_block_amax_of_incomplete_blocks() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, -6.0], [7.0, 8.0, 9.0]])
    assert block_amax(x, 1, 2).tolist() == [[2, 2, 3], [4, 4, 6], [8, 8, 9]]
    assert block_amax(x, 2, 2).tolist() == [[4, 4, 6], [4, 4, 6], [8, 8, 9]]
    assert block_amax(x[:0], 1, 2).shape == (0, 3)


def test_blocks_of_tokens_stay_within_an_expert() -> None:
    x = torch.arange(1.0, 7.0).unsqueeze(1) * torch.tensor([1.0, -10.0])
    amax = _rows(3, 3, 6).down_amax(x, 2)  # tokens 0 to 2, none, 3 to 5
    assert amax.tolist() == [[2, 20], [2, 20], [3, 30], [5, 50], [5, 50], [6, 60]]
    assert _rows(3, 3, 6).amax(x).tolist() == [30, 0, 60]


def test_delayed_scaling_uses_the_amaxes_of_earlier_calls() -> None:
    """Scales of calls with amaxes 2, 8, 4, 0 and one more: 448 / 2^margin / amax."""
    amaxes = (2.0, 8.0, 4.0, 0.0, 1.0)
    used = {}
    for algo, length in (("most_recent", 1), ("max", 2)):
        numerics = Fp8Numerics("delayed", margin=1, amax_history_len=length, amax_compute_algo=algo)
        scale = DelayedScale(numerics, "input")
        used[algo] = [float(scale.use(torch.tensor([amax]), record=True)) for amax in amaxes]
        kept = float(scale.use(torch.tensor([100.0]), record=False))
        assert float(scale.use(torch.tensor([100.0]), record=True)) == kept == 224.0
    assert used == {
        "most_recent": [1.0, 112.0, 28.0, 56.0, 56.0],  # amax 0: the scale is kept
        "max": [1.0, 112.0, 28.0, 28.0, 56.0],
    }


def test_a_state_from_a_checkpoint_follows_the_activations_to_their_device() -> None:
    scale = DelayedScale(Fp8Numerics("delayed", amax_history_len=2), "input")
    scale.set_state(torch.ones(3, 4))  # loaded on the CPU
    for _ in range(2):
        assert scale.use(torch.ones(4, device="meta"), record=True).is_meta
    assert scale.state().is_meta


def test_delayed_scales_are_per_expert_in_the_format_of_the_role() -> None:
    scale = DelayedScale(Fp8Numerics("delayed", backward=E5M2), "gradient")
    scale.use(torch.tensor([1.0, 0.0, float("inf")]), record=True)
    assert scale.use(torch.zeros(3), record=True).tolist() == [57344.0, 1.0, 1.0]


def test_tensorwise_scales_each_expert() -> None:
    """Expert 0's amax is 7: scale 64, 0.3 -> 19.2 -> 20; expert 1's is 3.5: 0.3 -> 38.4 -> 40."""
    x = torch.tensor([[7.0, 0.3], [3.5, 0.3]])
    expected = torch.tensor([[7.0, 20 / 64], [3.5, 40 / 128]])
    numerics = Fp8Numerics("tensorwise")
    for over_tokens in (False, True):
        rounded = quantize_tokens(x, _rows(1, 2), numerics, "input", over_tokens)
        assert rounded.tolist() == expected.tolist()
    assert quantize_weights(x.unsqueeze(1), numerics, True).squeeze(1).tolist() == expected.tolist()


def test_hybrid_rounds_gradients_to_e5m2() -> None:
    x = torch.tensor([[57344.0, 9.0]])
    numerics = Fp8Numerics("tensorwise", backward=E5M2)
    assert quantize_tokens(x, _rows(1), numerics, "gradient", False).tolist() == [[57344.0, 8.0]]
    # e4m3 multiplies by 448 / 57344 = 2^-7 and has one bit more: 9 x 2^-7 is exact.
    finer = quantize_tokens(x, _rows(1), numerics, "input", False)
    assert finer.tolist() == [[57344.0, 9.0]]


@pytest.mark.parametrize(("recipe", "size"), [("blockwise", 128), ("mxfp8", 32)])
def test_blocks_are_along_the_summed_axis(recipe: str, size: int) -> None:
    """A value of 448 in a corner gives its block scale 1, at which its neighbours of 2^-10 round to
    0 (a tie between 0 and 2^-9, to even); elsewhere scales are 2^18 and 2^-10 stays.
    """
    numerics = Fp8Numerics(recipe)
    x = torch.full((size + 1, size + 1), 2.0**-10)
    x[0, 0] = 448.0
    across = quantize_tokens(x, _rows(size + 1), numerics, "input", False)
    assert across[0, :size].count_nonzero() == 1 and across[0, size] == 2.0**-10
    assert across[1:].eq(2.0**-10).all()
    down = quantize_tokens(x, _rows(size + 1), numerics, "input", True)
    assert torch.equal(down, across.t())


def test_weight_blocks() -> None:
    """Blocks are 128 x 128 for blockwise and 32 along the summed axis for mxfp8, per expert."""
    weight = torch.full((2, 129, 129), 2.0**-10)
    weight[0, 0, 0] = 448.0
    lost = {
        (recipe, over_outputs): quantize_weights(weight, Fp8Numerics(recipe), over_outputs) == 0
        for recipe in ("blockwise", "mxfp8")
        for over_outputs in (False, True)
    }
    for over_outputs in (False, True):
        square = torch.zeros_like(weight, dtype=torch.bool)
        square[0, :128, :128] = True
        square[0, 0, 0] = False
        assert torch.equal(lost["blockwise", over_outputs], square)
    row = torch.zeros_like(weight, dtype=torch.bool)
    row[0, 0, 1:32] = True
    assert torch.equal(lost["mxfp8", False], row)
    assert torch.equal(lost["mxfp8", True], row.transpose(1, 2))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_rounding_is_idempotent(recipe: str, seed: int) -> None:
    x = torch.randn(70, 40, generator=torch.Generator().manual_seed(seed))
    numerics, rows = Fp8Numerics(recipe), _rows(30, 70)
    once = quantize_tokens(x, rows, numerics, "input", False)
    assert (once - x).norm() < 0.04 * x.norm()
    twice = quantize_tokens(once, rows, numerics, "input", False)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_settings() -> None:
    assert fp8_numerics(PrecisionSettings()) is None
    precision = PrecisionSettings(
        fp8_format="hybrid",
        fp8_margin=2,
        fp8_amax_history_len=16,
        fp8_amax_compute_algo="max",
    )
    assert fp8_numerics(precision) == Fp8Numerics("delayed", E4M3, E5M2, 2, 16, "max")
    uniform = fp8_numerics(PrecisionSettings(fp8_format="e4m3", fp8_recipe="mxfp8"))
    assert uniform == Fp8Numerics("mxfp8", E4M3, E4M3)
