"""FP8 numerics: scaling and rounding of matrix-product operands.

Results are float32 values that FP8 numbers times their scale represent exactly; their float32
products are those of a tensor core. docs/fp8.md compares each definition with Transformer Engine's
(``transformer_engine/common/recipe``, ``tests/pytorch/references``).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from moetron.moe.config.schema.precision import PrecisionSettings

Role = Literal["input", "weight", "gradient"]
"""Role of an operand: activations, a weight, or the gradient of a layer's output."""
BLOCK_SIZE = {"blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True)
class Fp8Numerics:
    """FP8 recipe and its number formats."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    forward: torch.dtype = torch.float8_e4m3fn
    """Format of activations and weights."""
    backward: torch.dtype = torch.float8_e4m3fn
    """Format of output gradients."""
    margin: int = 0
    """Delayed scaling: scales are divided by 2^margin."""
    amax_history_len: int = 1
    """Delayed scaling: length of the amax history."""
    amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Delayed scaling: amax of the history that sets the scale."""
    on_tensor_cores: bool = False
    """Multiply on FP8 tensor cores (`scaled_matmul`) what they can; emulate the rest."""

    def dtype(self, role: Role) -> torch.dtype:
        """Return the format of an operand."""
        return self.backward if role == "gradient" else self.forward


def fp8_numerics(precision: PrecisionSettings, on_tensor_cores: bool = False) -> Fp8Numerics | None:
    """Return the FP8 numerics of the settings, or None; ``hybrid`` has e5m2 gradients."""
    if precision.fp8_format is None:
        return None
    return Fp8Numerics(
        recipe=precision.fp8_recipe,
        backward=(torch.float8_e5m2 if precision.fp8_format == "hybrid" else torch.float8_e4m3fn),
        margin=precision.fp8_margin,
        amax_history_len=precision.fp8_amax_history_len,
        amax_compute_algo=precision.fp8_amax_compute_algo,
        on_tensor_cores=on_tensor_cores,
    )


def scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return max_fp8 / amax, which maps the largest magnitude to the end of the format's range.

    1 if ``amax`` (float32) is 0 or not finite; the largest float32 if the quotient overflows.
    """
    limit = torch.finfo(torch.float32).max
    scale = (torch.finfo(dtype).max / amax).clamp(max=limit)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def power_of_two_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `scale_of` rounded down to a power of two, at most 2^127.

    Its reciprocal is the E8M0 scale of the OCP microscaling formats as Transformer Engine computes
    it, amax / max_fp8 rounded *up* to a power of two, so that nothing saturates.
    """
    _, exponent = torch.frexp(scale_of(amax, dtype))  # scale = mantissa in [0.5, 1) x 2^exponent
    return torch.ldexp(torch.ones_like(amax), exponent - 1)


def round_to_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round x * scale to ``dtype`` (nearest, ties to even) and divide by the scale: float32.

    Args:
        x: any floating dtype; magnitudes beyond the range saturate, NaN stays NaN.
        scale: float32, broadcast to ``x``.
        dtype: float8_e4m3fn or float8_e5m2.
    """
    limit = torch.finfo(dtype).max
    rounded = (x.float() * scale).clamp(-limit, limit).to(dtype)
    return rounded.float() * scale.reciprocal()


def block_amax(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return for each element of x [..., M, K] the amax of its block of rows x columns: float32.

    Blocks start at the first row and column; the last ones may be smaller.
    """
    height, width = x.shape[-2:]
    padded = F.pad(x.abs().float(), (0, -width % columns, 0, -height % rows))
    down, across = padded.shape[-2] // rows, padded.shape[-1] // columns
    blocks = padded.unflatten(-1, (across, columns)).unflatten(-3, (down, rows))
    spread = blocks.amax((-3, -1), keepdim=True).expand_as(blocks)
    return spread.flatten(-2).flatten(-3, -2)[..., :height, :width]


def segment_amax(x_TK: torch.Tensor, segment_T: torch.Tensor, segments: int) -> torch.Tensor:
    """Return the amax of each column in each segment of rows: float32 [segments, K].

    ``segment_T`` (int64) is the segment of each row; a segment without rows gets 0.
    """
    amax = torch.zeros(segments, x_TK.shape[1], device=x_TK.device)
    index_TK = segment_T.unsqueeze(1).expand_as(x_TK)
    return amax.scatter_reduce_(0, index_TK, x_TK.abs().float(), "amax")


class Rows:
    """Assignment of rows of a token tensor to experts; a dense layer is a single expert.

    Args:
        ends_E: int [experts], one past each expert's last row, ascending.
    """

    def __init__(self, ends_E: torch.Tensor) -> None:
        self.ends_E = ends_E
        self.experts = len(ends_E)
        self.count = int(ends_E[-1])
        self._starts_E = F.pad(ends_E[:-1].long(), (1, 0))
        sizes_E = ends_E.long() - self._starts_E
        self._sizes_E = sizes_E
        experts_E = torch.arange(self.experts, device=ends_E.device)
        self.expert_T = experts_E.repeat_interleave(sizes_E)

    def amax(self, x_TK: torch.Tensor) -> torch.Tensor:
        """Return the amax of each expert's rows: float32 [experts], 0 without rows."""
        return segment_amax(x_TK, self.expert_T, self.experts).amax(1)

    def down_amax(self, x_TK: torch.Tensor, size: int) -> torch.Tensor:
        """Return for each element the amax of its column in its block of ``size`` expert rows."""
        blocks_E = -(-self._sizes_E // size)
        first_E = blocks_E.cumsum(0) - blocks_E
        within_T = torch.arange(self.count, device=x_TK.device) - self._starts_E[self.expert_T]
        block_T = first_E[self.expert_T] + within_T // size
        return segment_amax(x_TK, block_T, int(blocks_E.sum()))[block_T]


class DelayedScale:
    """Per-expert scales from the amaxes of earlier calls; 1 before the first.

    Transformer Engine's ``DelayedScaling`` (``recipe/delayed_scaling.cu``) without its reduction of
    amaxes over ranks: each rank keeps its own, as with ``reduce_amax=False``.
    """

    def __init__(self, numerics: Fp8Numerics, role: Role) -> None:
        self._numerics = numerics
        self._dtype = numerics.dtype(role)
        self._history_LE = torch.empty(0)  # [calls, experts], newest first
        self._scale_E = torch.empty(0)

    def use(self, amax_E: torch.Tensor, record: bool) -> torch.Tensor:
        """Return this call's scales, float32 [experts]; ``amax_E`` updates those of the next call.

        An expert whose amax is 0 or not finite keeps its scale.
        """
        if not len(self._history_LE):
            length = self._numerics.amax_history_len
            self._history_LE = amax_E.new_zeros(length, len(amax_E))
            self._scale_E = torch.ones_like(amax_E)
        if self._scale_E.device != amax_E.device:  # a checkpoint's state is on the CPU
            self._history_LE = self._history_LE.to(amax_E.device)
            self._scale_E = self._scale_E.to(amax_E.device)
        scale_E = self._scale_E
        if record:
            self._history_LE = torch.cat([amax_E.unsqueeze(0), self._history_LE[:-1]])
            newest = self._numerics.amax_compute_algo == "most_recent"
            chosen_E = self._history_LE[0] if newest else self._history_LE.amax(0)
            usable_E = chosen_E.isfinite() & (chosen_E > 0)
            updated_E = scale_of(chosen_E, self._dtype) * 2.0**-self._numerics.margin
            self._scale_E = torch.where(usable_E, updated_E, scale_E)
        return scale_E

    def state(self) -> torch.Tensor:
        """Return history (newest first) and scales: float32 [history + 1, experts].

        Empty before the first call.
        """
        if not len(self._history_LE):
            return self._history_LE
        return torch.cat([self._history_LE, self._scale_E.unsqueeze(0)])

    def set_state(self, state: torch.Tensor) -> None:
        """Restore a state, which may have another history length."""
        length = self._numerics.amax_history_len
        history_LE = state[:-1][:length]
        self._history_LE = F.pad(history_LE, (0, 0, 0, length - len(history_LE)))
        self._scale_E = state[-1]


def quantize_tokens(
    x_TK: torch.Tensor, rows: Rows, numerics: Fp8Numerics, role: Role, over_tokens: bool
) -> torch.Tensor:
    """Round activations or gradients with current scaling (every recipe but ``delayed``).

    Args:
        x_TK: [tokens, channels].
        rows: experts of the rows; no scale spans two experts.
        numerics: the recipe.
        role: "input" or "gradient".
        over_tokens: the product sums over tokens (weight gradient), not over channels; blocks are
            along that axis.

    Returns:
        float32 [tokens, channels].
    """
    dtype = numerics.dtype(role)
    if numerics.recipe == "tensorwise":
        scale = scale_of(rows.amax(x_TK), dtype)[rows.expert_T].unsqueeze(1)
        return round_to_fp8(x_TK, scale, dtype)
    size = BLOCK_SIZE[numerics.recipe]
    amax_TK = rows.down_amax(x_TK, size) if over_tokens else block_amax(x_TK, 1, size)
    return round_to_fp8(x_TK, power_of_two_scale(amax_TK, dtype), dtype)


def quantize_weights(
    weight_ENK: torch.Tensor, numerics: Fp8Numerics, over_outputs: bool
) -> torch.Tensor:
    """Round weights with current scaling (every recipe but ``delayed``).

    Args:
        weight_ENK: [experts, outputs, inputs].
        numerics: the recipe.
        over_outputs: the product sums over outputs (input gradient), not over inputs.

    Returns:
        float32 [experts, outputs, inputs].
    """
    dtype = numerics.forward
    if numerics.recipe == "tensorwise":
        amax = weight_ENK.abs().float().amax((1, 2), keepdim=True)
        return round_to_fp8(weight_ENK, scale_of(amax, dtype), dtype)
    size = BLOCK_SIZE[numerics.recipe]
    if numerics.recipe == "blockwise":
        amax = block_amax(weight_ENK, size, size)
    else:
        amax = block_amax(weight_ENK, *((size, 1) if over_outputs else (1, size)))
    return round_to_fp8(weight_ENK, power_of_two_scale(amax, dtype), dtype)
