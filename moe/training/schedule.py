"""The learning rate as a pure function of a run's position.

The learning rate of a step is that of the position *before* it, as in Megatron: the first step of a
warm-up from 0 has learning rate 0.
"""

import math
from dataclasses import dataclass

from moetron.moe.config.derived import ScheduleLengths, schedule_lengths
from moetron.moe.config.run import LearningRateSettings
from moetron.moe.config.settings import Settings
from moetron.moe.training.progress import Progress


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then one of five shapes, measured in steps or in tokens.

    ``x`` is the position, ``w`` the length of the warm-up, ``e`` the end of the decay and
    ``r = (x - w) / (e - w)`` the share of the decay that is done.

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

    @classmethod
    def of(cls, settings: Settings) -> "LearningRate":
        """The schedule of a run."""
        return cls(settings.learning_rate, schedule_lengths(settings))

    def at(self, progress: Progress) -> float:
        """Learning rate of the step that starts at ``progress``."""
        x = progress.consumed_tokens if self.lengths.unit == "tokens" else progress.step
        rate, warmup = self.settings, self.lengths.warmup
        if x < warmup:
            return rate.lr_warmup_init + (rate.lr - rate.lr_warmup_init) * x / warmup
        if rate.lr_decay_style == "inverse-square-root":
            return max(rate.min_lr, rate.lr * math.sqrt(max(warmup, 1) / max(x, 1)))
        return rate.min_lr + (rate.lr - rate.min_lr) * self._share(x)

    def _share(self, x: int) -> float:
        """What is left of the way from min to peak, 0 to 1."""
        style, start, end = self.settings.lr_decay_style, self.lengths.warmup, self.lengths.end
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
