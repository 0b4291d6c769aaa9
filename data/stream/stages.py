"""Stages of a run: sources, weights, objective and seed by range of tokens.

The stage of a sample follows from its number, so a run changes stages, and resumes in any of them,
by arithmetic. A source that the next stage reads with the same seed and windowing continues where
the previous stage stopped, whatever the weights; otherwise its windows are reshuffled (OLMoE's
annealing).
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from moetron.common.errors import UserError
from moetron.common.text import table
from moetron.data.addressing.windowing import Windowing
from moetron.data.objectives.objective import Objective
from moetron.data.stream.addresses import ShuffledAddresses
from moetron.data.stream.repetition import RepetitionFilter
from moetron.data.stream.token_stream import TokenStream, open_sources


@dataclass(frozen=True)
class Stage:
    """Settings of one stage."""

    data_path: Sequence[str]
    """As ``--data-path``."""
    objective: Objective
    seed: int
    until_tokens: int | None = None
    """Token count of the run at which the stage ends; None: never (the last stage)."""
    own_objectives: Mapping[str, Objective] = field(default_factory=dict)
    """Objectives of sources that use another one, by source name."""


@dataclass(frozen=True)
class Use:
    """Use of one source in one stage."""

    stage: int
    source: int
    """Number in ``StagedStream.source_names``."""
    samples: int
    tokens: int
    """Tokens of the source that the samples consume."""
    epochs: float
    """Samples divided by the samples of one epoch."""


class StagedStream:
    """Samples of consecutive stages by number."""

    def __init__(
        self,
        stages: Sequence[Stage],
        seq_length: int,
        eod_mask_loss: bool = False,
        expected_fingerprint: str | None = None,
        repetition: RepetitionFilter | None = None,
    ) -> None:
        """Open the sources; arguments as for ``training_stream``.

        A stage ends with the sample that reaches its ``until_tokens``.

        Raises:
            UserError: a shard cannot be used, or the stage boundaries do not increase.
        """
        self.starts = _starts([stage.until_tokens for stage in stages], seq_length)
        self.seq_length = seq_length
        opened = [
            open_sources(
                stage.data_path, stage.objective, stage.own_objectives, expected_fingerprint
            )
            for stage in stages
        ]
        self._blends = [blend for blend, _ in opened]
        sources = [source for blend in self._blends for source in blend.sources]
        self._prefixes = list(dict.fromkeys(source.prefix for source in sources))
        names = {source.prefix: source.name for source in sources}
        self.source_names = [names[prefix] for prefix in self._prefixes]
        self._numbers = [
            [self._prefixes.index(source.prefix) for source in blend.sources]
            for blend in self._blends
        ]
        self._streams = [
            TokenStream(blend, addresses, objectives, seq_length, key, eod_mask_loss, repetition)
            for (blend, objectives), addresses, key in zip(
                opened, self._orders(stages), self._keys(stages), strict=True
            )
        ]
        kinds = [stream.objective_names for stream in self._streams]
        self.objective_names = list(dict.fromkeys(chain.from_iterable(kinds)))
        self._kinds = [[self.objective_names.index(kind) for kind in mine] for mine in kinds]

    def limit_ids(self, vocab_size: int) -> None:
        """See ``TokenStream.limit_ids``."""
        for stream in self._streams:
            stream.limit_ids(vocab_size)

    def _orders(self, stages: Sequence[Stage]) -> Iterator[ShuffledAddresses]:
        """Yield the addresses of each stage, after the windows that earlier stages drew."""
        drawn: dict[tuple[int, int, Windowing], int] = {}
        for i, stage in enumerate(stages):
            if len(set(self._numbers[i])) < len(self._numbers[i]):
                raise UserError(f"{' '.join(stage.data_path)}: has a source twice")
            windowings = [source.windowing for source in self._blends[i].sources]
            places = [(n, stage.seed, c) for n, c in zip(self._numbers[i], windowings, strict=True)]
            taken = [drawn.get(place, 0) for place in places]
            addresses = ShuffledAddresses(self._blends[i], stage.seed, self._numbers[i], taken)
            yield addresses
            if stage.until_tokens is not None:
                counts = addresses.apportionment.counts(self.starts[i + 1] - self.starts[i])
                drawn |= {p: t + c for p, t, c in zip(places, taken, counts, strict=True)}

    def _keys(self, stages: Sequence[Stage]) -> list[str]:
        """Return the key of each stage in the random draws of its objective."""
        return [
            f"seed {stage.seed} from {start}" if start else f"seed {stage.seed}"
            for stage, start in zip(stages, self.starts, strict=True)
        ]

    def without_ends(self) -> list[str]:
        """Return the prefixes of the sources whose documents have no end-of-document token.

        Shards without a manifest are taken to have it.
        """
        sources = {source.prefix: source for blend in self._blends for source in blend.sources}
        return [
            prefix
            for prefix, source in sources.items()
            if any(s.manifest is not None and not s.manifest.appended_eod for s in source.shards)
        ]

    @property
    def bytes_per_token(self) -> list[float | None]:
        """Return None for each source: unknown over several stages."""
        return [None] * len(self.source_names)

    def __len__(self) -> int:
        """Return the number of samples: the last stage has no end."""
        return self.starts[-1] + len(self._streams[-1])

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample ``n``, as from ``TokenStream``, with ``source`` counted over all stages."""
        if n < 0:
            raise IndexError(f"sample {n}")
        stage = self.stage(n)
        sample = self._streams[stage][n - self.starts[stage]]
        sample["source"] = self._numbers[stage][sample["source"]]
        sample["objective"] = self._kinds[stage][sample["objective"]]
        return sample

    def stage(self, n: int) -> int:
        """Return the stage of sample ``n``."""
        return bisect_right(self.starts, n) - 1

    def uses(self, samples: int) -> list[Use]:
        """Return the use of each source in each stage of a run of ``samples`` samples."""
        found = []
        for stage, (start, end) in enumerate(pairwise([*self.starts, samples])):
            blend, addresses = self._blends[stage], self._streams[stage].addresses
            assert isinstance(addresses, ShuffledAddresses)
            counts = addresses.apportionment.counts(max(0, min(end, samples) - start))
            for source, number, count in zip(
                blend.sources, self._numbers[stage], counts, strict=True
            ):
                tokens = round(count * source.windowing.mean_advance)
                found.append(Use(stage, number, count, tokens, count / source.windows))
        return found

    def state(self) -> dict[str, Any]:
        """Return what identifies the stream (JSON): the stages, and each source once."""
        states = [stream.state() for stream in self._streams]
        sources = {source["name"]: source for state in states for source in state.pop("sources")}
        return {"sources": list(sources.values()), "starts": self.starts, "stages": states}


def refuse_repetition(
    stream: StagedStream,
    samples: int,
    max_epochs: float | None,
    of_sources: Mapping[str, float] | None = None,
) -> None:
    """Raise UserError, with a table, if a run exceeds a source's epoch cap over all stages.

    ``of_sources``: caps by source name; ``max_epochs``: cap of the others, None: no cap.
    """
    caps = of_sources or {}
    if unknown := caps.keys() - set(stream.source_names):
        raise UserError(
            f"--source-max-epochs: no source {', '.join(sorted(unknown))}; "
            f"available: {', '.join(stream.source_names)}"
        )
    epochs = [0.0] * len(stream.source_names)
    for use in stream.uses(samples):
        epochs[use.source] += use.epochs
    default = math.inf if max_epochs is None else max_epochs
    over = [
        (name, f"{name} {times:.3f} times (at most {cap:g})")
        for name, times in zip(stream.source_names, epochs, strict=True)
        if times > (cap := caps.get(name, default))
    ]
    if over:
        flag = "--source-max-epochs" if all(name in caps for name, _ in over) else "--max-epochs"
        raise UserError(
            f"{flag}: the run of {samples * stream.seq_length:,} tokens would repeat "
            f"{', '.join(text for _, text in over)}; change weights or stages, or shorten the run\n"
            + use_table(stream, samples)
        )


def use_table(stream: StagedStream, samples: int) -> str:
    """Return a table of samples, their fraction, tokens and epochs by stage and source."""
    rows = [("source", "stage", "samples", "share", "tokens", "epochs")]
    uses = stream.uses(samples)
    sums = Counter[int]()
    for use in uses:
        sums[use.stage] += use.samples
    for number, name in enumerate(stream.source_names):
        mine = [use for use in uses if use.source == number]
        rows += [_row(name, str(use.stage + 1), [use], sums[use.stage]) for use in mine]
        if len(mine) > 1:
            rows.append(_row(name, "all", mine, samples))
    return table(rows)


def _row(
    name: str, stage: str, uses: Sequence[Use], of_samples: int
) -> tuple[str, str, str, str, str, str]:
    """Return a row of the table: the sum of ``uses`` and its fraction of ``of_samples``."""
    samples, tokens = sum(use.samples for use in uses), sum(use.tokens for use in uses)
    epochs = sum(use.epochs for use in uses)
    fraction = samples / max(of_samples, 1)
    return name, stage, f"{samples:,}", f"{fraction:.2%}", f"{tokens:,}", f"{epochs:.3f}"


def _starts(until_tokens: Sequence[int | None], seq_length: int) -> list[int]:
    """Return the first sample of each stage."""
    *ends, last = until_tokens
    if last is not None:
        raise UserError(
            f"stages: until_tokens {last}: the last stage ends with the run; leave it out"
        )
    starts = [0]
    for number, end in enumerate(ends, 1):
        if end is None:
            raise UserError(f"stages: stage {number} needs until_tokens, because another follows")
        starts.append(-(-end // seq_length))
        if starts[-1] <= starts[-2]:
            raise UserError(f"stages: until_tokens {end} of stage {number} leaves no sample for it")
    return starts
