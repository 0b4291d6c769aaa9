"""The learning rate as a pure function of a run's position.

The learning rate of a step is that of the position *before* it, as in Megatron: the first step of a
warm-up from 0 has learning rate 0.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from moetron.moe.checkpoint.position import Progress
from moetron.moe.config.schema.data import StageLearningRate
from moetron.moe.config.schema.derived import (
    ScheduleLengths,
    schedule_lengths,
    stage_starts,
    total_samples,
)
from moetron.moe.config.schema.run import LearningRateSettings
from moetron.moe.config.schema.settings import Settings


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then one of five shapes, measured in steps or in tokens.

    ``x`` is the position, ``w`` the length of the warm-up, ``e`` the end of the decay and
    ``r = (x - w) / (e - w)`` the fraction of the decay that is done.

    ==================== =======================================================================
    x < w                init + (peak - init) x / w
    constant             peak
    linear, cosine       min + (peak - min) c(r); c = 1 - r, or (1 + cos(pi r)) / 2
    WSD                  peak until e - a (a: length of the final decay), then the same with
                         r = (x - (e - a)) / a and c = 1 - r, (1 + cos(pi r)) / 2,
                         2 (1/2)^r - 1, or 1 - sqrt(r)
    inverse-square-root  max(min, peak sqrt(w / x))
    ==================== =======================================================================

    All but ``constant`` and ``inverse-square-root`` stay at ``min`` after ``e``. The shapes are
    those of megatron-core's ``OptimizerParamScheduler``; OpenMoE's flat start before the inverse
    root is ``init = peak``.
    """

    settings: LearningRateSettings
    lengths: ScheduleLengths
    segments: tuple["Segment", ...] = ()
    """Stages with their own learning rate."""

    @classmethod
    def of(cls, settings: Settings) -> "LearningRate":
        """Return the schedule of a run."""
        return cls(settings.learning_rate, schedule_lengths(settings), _segments(settings))

    def at(self, progress: Progress) -> float:
        """Return the learning rate of the step that starts at ``progress``."""
        for segment in self.segments:
            if segment.start <= progress.consumed_tokens < segment.end:
                return segment.at(progress.consumed_tokens)
        x = progress.consumed_tokens if self.lengths.unit == "tokens" else progress.step
        rate, warmup = self.settings, self.lengths.warmup
        if x < warmup:
            return rate.lr_warmup_init + (rate.lr - rate.lr_warmup_init) * x / warmup
        if rate.lr_decay_style == "inverse-square-root":
            return max(rate.min_lr, rate.lr * math.sqrt(max(warmup, 1) / max(x, 1)))
        return rate.min_lr + (rate.lr - rate.min_lr) * self._decay_factor(x)

    def _decay_factor(self, x: int) -> float:
        """Return (rate - min) / (peak - min), 0 to 1."""
        style: str = self.settings.lr_decay_style
        start, end = self.lengths.warmup, self.lengths.end
        if style == "constant":
            return 1.0
        if style == "WSD":
            assert self.lengths.final_decay is not None
            style, start = self.settings.lr_wsd_decay_style, end - self.lengths.final_decay
        if x <= start:
            return 1.0
        if x >= end:
            return 0.0
        r = (x - start) / (end - start)
        return {
            "linear": 1 - r,
            "cosine": (1 + math.cos(math.pi * r)) / 2,
            "exponential": 2 * 0.5**r - 1,
            "minus_sqrt": 1 - math.sqrt(r),
        }[style]


@dataclass(frozen=True)
class Segment:
    """A stage with its own learning rate, from ``lr`` to ``min_lr``."""

    start: int
    """Tokens of the run at which it begins."""
    end: int
    """Tokens at which the next stage begins or the run ends."""
    rate: StageLearningRate

    def at(self, tokens: int) -> float:
        """Return the learning rate of the step that starts at ``tokens`` of the run."""
        r = (tokens - self.start) / (self.end - self.start)
        factor = {"constant": 1.0, "linear": 1 - r, "cosine": (1 + math.cos(math.pi * r)) / 2}
        return (
            self.rate.min_lr + (self.rate.lr - self.rate.min_lr) * factor[self.rate.lr_decay_style]
        )


def _segments(settings: Settings) -> tuple[Segment, ...]:
    """Return the stages with their own learning rate that the run reaches."""
    length = settings.model.seq_length
    bounds = [start * length for start in (*stage_starts(settings), total_samples(settings))]
    return tuple(
        Segment(start, end, stage.learning_rate)
        for (start, end), stage in zip(pairwise(bounds), settings.data.stages or [], strict=False)
        if stage.learning_rate is not None and start < end
    )
