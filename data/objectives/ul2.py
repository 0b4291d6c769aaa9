"""UL2: a mixture of denoisers, as in OpenMoE's training.

Tay et al. 2022 (UL2) as configured in ``preprocessors.py`` of OpenMoE's fork of the T5 code: half
prefix language modelling, half span corruption of five kinds, each with a mode prefix in plain
text. A sample is inputs, end, targets, end, in one decoder, with loss only on the targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.addressing.apportionment import Apportionment
from moetron.data.addressing.windowing import Windowing
from moetron.data.objectives.objective import Made
from moetron.data.objectives.spans import corrupted_lengths, draws, hide_spans, span_counts

MAX_CYCLE = 1000
"""Maximum number of samples after which the mixture repeats."""


@dataclass(frozen=True)
class Denoiser:
    """Settings of one denoiser."""

    rate: float
    """Fraction of samples (any unit; normalized to sum to 1)."""
    mode: str
    """Mode prefix."""
    noise_density: float = 0.5
    """Fraction of tokens hidden (r)."""
    mean_span: float | None = None
    """Mean length of a hidden span (mu); None: one hidden suffix, its start uniform (prefix LM)."""


OPENMOE = (
    Denoiser(0.5, "[S2S] "),
    Denoiser(0.1, "[NLU] ", 0.15, 3),
    Denoiser(0.1, "[NLU] ", 0.15, 8),
    Denoiser(0.1, "[NLG] ", 0.5, 3),
    Denoiser(0.1, "[NLG] ", 0.5, 8),
    Denoiser(0.1, "[NLG] ", 0.5, 64),
)


class UL2:
    """Samples of a mixture of denoisers; each takes as many raw tokens as fit.

    The denoiser follows from the sample's index in its source: a repeating pattern in which each
    denoiser has exactly its rate. So windows are computed, no raw token is skipped or seen twice
    in an epoch, and padding is a position or two where lengths do not fit exactly. OpenMoE took at
    most 1,024 input tokens an example, packed or padded shorter ones (low noise densities), and
    started every example with the start id; here later examples of a sample follow an end.
    """

    def __init__(
        self,
        seq_length: int,
        encode: Callable[[str], Sequence[int]],
        sentinels: Sequence[int],
        end: int,
        start: int,
        denoisers: Sequence[Denoiser] = OPENMOE,
        examples: int = 1,
    ) -> None:
        """Compute the lengths.

        Args:
            seq_length: Tokens of a sample (S), a multiple of ``examples``.
            encode: The tokenizer's ``encode``, for the mode prefixes.
            sentinels: Ids of hidden spans, in the order of use.
            end: Id that ends inputs and targets.
            start: First input id (OpenMoE: 0), also padding.
            denoisers: The mixture.
            examples: Texts in a sample; more than one if the sentinels do not suffice for one.

        Raises:
            UserError: there are too few sentinels, or the sample is too short for a denoiser.
        """
        if seq_length % examples:
            raise UserError(f"UL2: {examples} examples do not divide --seq-length {seq_length}")
        self.denoisers = tuple(denoisers)
        self.examples = examples
        self._sentinels = np.array(sentinels, np.int64)
        self._end, self._start = end, start
        self._prefixes = [np.array(encode(d.mode), np.int64) for d in self.denoisers]
        room = seq_length // examples
        self._raw = [
            self._raw_length(denoiser, room - prefix.size)
            for denoiser, prefix in zip(self.denoisers, self._prefixes, strict=True)
        ]
        apportionment = Apportionment([denoiser.rate for denoiser in self.denoisers])
        cycle = sum(apportionment.weights)
        if cycle > MAX_CYCLE:
            raise UserError(f"UL2: rates in {cycle} parts; give rates in at most {MAX_CYCLE}")
        self.kinds = tuple(_kind(denoiser) for denoiser in self.denoisers)
        self._slots = apportionment.locate(np.arange(cycle))[0].tolist()
        self.windowing = Windowing(tuple(examples * self._raw[d] for d in self._slots), overlap=0)

    def fill(self, raw: np.ndarray, slot: int, key: str, row: np.ndarray, mask: np.ndarray) -> Made:
        """Hide parts of the raw tokens; see ``Objective``. Several examples have no prefix."""
        number = self._slots[slot]
        row[:] = self._start
        mask[:] = 0.0
        for example, text in enumerate(np.split(raw.astype(np.int64), self.examples)):
            inputs, targets = self._hide(text, number, draws(f"{key} {example}", text.size))
            first = example * (mask.size // self.examples)
            middle, last = first + inputs.size, first + inputs.size + targets.size
            row[1 + first : 1 + middle] = inputs
            row[1 + middle : 1 + last] = targets
            mask[middle:last] = 1.0
        return Made(number, 1 + middle if self.examples == 1 else 0)

    def state(self) -> dict[str, Any]:
        """Return the mixture."""
        denoisers = [asdict(denoiser) for denoiser in self.denoisers]
        return {"name": "ul2", "denoisers": denoisers, "examples": self.examples}

    def _hide(
        self, text: np.ndarray, number: int, uniform: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets) of one text, int64; ``uniform``: a random number a token."""
        denoiser, prefix = self.denoisers[number], self._prefixes[number]
        if denoiser.mean_span is None:
            split = 1 + int(uniform[0] % np.uint64(text.size - 1))
            kept, hidden = text[:split], text[split:]
        else:
            shape = denoiser.noise_density, denoiser.mean_span
            kept, hidden = hide_spans(text, *shape, self._sentinels, uniform)
        return np.concatenate([prefix, kept, [self._end]]), np.append(hidden, self._end)

    def _raw_length(self, denoiser: Denoiser, room: int) -> int:
        """Return the most raw tokens whose inputs and targets, with ends, fit into ``room``."""
        if denoiser.mean_span is None:
            longest = room - 2
        else:
            shape = denoiser.noise_density, denoiser.mean_span
            fits = (n for n in range(room, 1, -1) if sum(corrupted_lengths(n, *shape)) <= room)
            longest = next(fits, 0)
        if longest < 2:
            raise UserError(
                f"UL2: no room for {denoiser} in {room} tokens; use a longer --seq-length"
            )
        if denoiser.mean_span is not None:
            spans = span_counts(longest, denoiser.noise_density, denoiser.mean_span)[1]
            if spans > self._sentinels.size:
                raise UserError(
                    f"UL2: {denoiser} hides {spans} spans in {longest} tokens, but the tokenizer "
                    f"has {self._sentinels.size} sentinels; put more examples into a sample"
                )
        return longest


def _kind(denoiser: Denoiser) -> str:
    """Return a denoiser's name in the log."""
    if denoiser.mean_span is None:
        return "ul2 prefix"
    return f"ul2 r={denoiser.noise_density:g} mu={denoiser.mean_span:g}"
