"""Samples computed from their number, without an index.

n -> (source, number of earlier samples from it) by ``apportionment``; that number -> (epoch,
position) by division; position -> window by the epoch's ``permutation``; window -> tokens of the
shard by ``windowing``; the objective makes the sample from them. Start-up time, memory and resume
state do not grow with the data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np

from moetron.common.errors import UserError
from moetron.data.objectives.causal import Causal
from moetron.data.objectives.objective import Made, Objective
from moetron.data.stream.addresses import Addresses, FileOrderAddresses, ShuffledAddresses
from moetron.data.stream.blend import Blend, Source, open_blend
from moetron.data.stream.id_range import refuse_ids_outside
from moetron.data.stream.repetition import RepetitionFilter

ADDRESS_BLOCK = 256
"""Addresses computed at once, because numpy has a cost per call. The first request in a block
computes one address only, because random access does not use the neighbours."""


def training_stream(
    data_path: Sequence[str],
    seq_length: int,
    seed: int,
    eod_mask_loss: bool = False,
    expected_fingerprint: str | None = None,
    objective: Objective | None = None,
) -> "TokenStream":
    """Open the blend ``data_path``, reshuffled each epoch, without end.

    Args:
        data_path: ``[PREFIX, ...]`` (in proportion to size) or ``[WEIGHT, PREFIX, ...]``.
        seq_length: Tokens in a sample (S).
        seed: Seed of the window order.
        eod_mask_loss: Mask the loss where the input is an end-of-document token (Megatron's rule).
        expected_fingerprint: The run's tokenizer; shards of another are rejected.
        objective: Training objective; default: causal.

    Raises:
        UserError: A shard cannot be used, or the list has another form.
    """
    blend, objectives = open_sources(
        data_path, objective or Causal(seq_length), {}, expected_fingerprint
    )
    addresses = ShuffledAddresses(blend, seed)
    return TokenStream(blend, addresses, objectives, seq_length, f"seed {seed}", eod_mask_loss)


def validation_stream(
    data_path: Sequence[str],
    seq_length: int,
    eod_mask_loss: bool = False,
    expected_fingerprint: str | None = None,
    objective: Objective | None = None,
    own_objectives: Mapping[str, Objective] | None = None,
    at_most: int | None = None,
) -> "TokenStream":
    """Open every window of every source once, in file order; arguments as ``training_stream``.

    Weights have no effect. ``own_objectives``: objectives of sources that use another one, by
    source name. ``at_most``: open this many windows only, spread evenly over all.
    """
    blend, objectives = open_sources(
        data_path, objective or Causal(seq_length), own_objectives or {}, expected_fingerprint
    )
    addresses = FileOrderAddresses(blend, at_most)
    return TokenStream(blend, addresses, objectives, seq_length, "validation", eod_mask_loss)


def open_sources(
    data_path: Sequence[str],
    objective: Objective,
    own_objectives: Mapping[str, Objective],
    expected_fingerprint: str | None,
) -> tuple[Blend, list[Objective]]:
    """Open a blend whose sources are windowed by their objectives; return it with the objectives.

    Args:
        data_path: As for ``training_stream``.
        objective: Objective of the sources that ``own_objectives`` does not name.
        own_objectives: Objectives by source name.
        expected_fingerprint: As for ``training_stream``.

    Raises:
        UserError: As ``training_stream``.
    """
    windowings = {name: own.windowing for name, own in own_objectives.items()}
    blend = open_blend(data_path, objective.windowing, expected_fingerprint, windowings)
    return blend, [own_objectives.get(source.name, objective) for source in blend.sources]


class TokenStream:
    """Samples of a blend by number."""

    def __init__(
        self,
        blend: Blend,
        addresses: Addresses,
        objectives: Sequence[Objective],
        seq_length: int,
        key: str,
        eod_mask_loss: bool,
        repetition: RepetitionFilter | None = None,
    ) -> None:
        """Take one objective a source; ``key`` names the stream in the keys of random draws."""
        self.sources = blend.sources
        self.objectives = list(objectives)
        self.seq_length = seq_length
        self.key = key
        self.repetition = repetition
        self.source_names = [source.name for source in blend.sources]
        kinds = [objective.kinds for objective in objectives]
        self.objective_names = list(dict.fromkeys(chain.from_iterable(kinds)))
        self._kinds = [[self.objective_names.index(kind) for kind in mine] for mine in kinds]
        self.bytes_per_token = [
            _bytes_per_token(source) if isinstance(objective, Causal) else None
            for source, objective in zip(blend.sources, objectives, strict=True)
        ]
        self.addresses = addresses
        self._eods = [_eod(source) for source in blend.sources] if eod_mask_loss else None
        self._vocab_size: int | None = None
        self._block = self._touched_block = -1
        self._block_addresses: tuple[list[int], list[int]] = ([], [])

    def limit_ids(self, vocab_size: int) -> None:
        """Refuse ids that a model with ``vocab_size`` ids cannot take: in all shards, before a run.

        A sample that holds one all the same, because a shard was changed, is refused when it is
        read.

        Raises:
            UserError: names every shard with such ids.
        """
        refuse_ids_outside([s for source in self.sources for s in source.shards], vocab_size)
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.addresses)

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return sample ``n``: tokens, labels int64 [S], loss_mask float32 [S], and four integers.

        They are its ``source``, its ``objective`` (index in ``objective_names``), the length of its
        bidirectional ``prefix``, and whether it is ``filtered``. Tokens and labels share memory. Of
        an encoder-decoder ``segments``, int64 [S], unless the sample is one example.
        """
        row = np.empty(self.seq_length + 1, np.int64)
        mask = np.ones(self.seq_length, np.float32)
        source, made, filtered = self._read(n, row, mask)
        segments = {} if made.segments is None else {"segments": made.segments}
        return {
            **segments,
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": mask,
            "source": source,
            "objective": self._kinds[source][made.kind],
            "prefix": made.prefix,
            "filtered": int(filtered),
        }

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """Return stacked tokens, labels int64 [N, S], loss_mask float32 [N, S] and source [N]."""
        rows = np.empty((len(numbers), self.seq_length + 1), np.int64)
        masks = np.ones((len(numbers), self.seq_length), np.float32)
        sources = [self._read(*each)[0] for each in zip(numbers, rows, masks, strict=True)]
        return {
            "tokens": rows[:, :-1],
            "labels": rows[:, 1:],
            "loss_mask": masks,
            "source": np.array(sources, np.int64),
        }

    def state(self) -> dict[str, Any]:
        """Return what identifies the stream (JSON): sources, order, length, mask, tokenizers."""
        return {
            "sources": [_source_state(source) for source in self.sources],
            "order": self.addresses.state(),
            "objective": self._objective_state(),
            "seq_length": self.seq_length,
            "eod_mask_loss": self._eods is not None,
            "repetition": None if self.repetition is None else asdict(self.repetition),
        }

    def _objective_state(self) -> dict[str, Any]:
        """Return the objective's state, or the states by source name if they differ."""
        states = [objective.state() for objective in self.objectives]
        if all(state == states[0] for state in states):
            return states[0]
        return {"by_source": dict(zip(self.source_names, states, strict=True))}

    def _read(self, n: int, row: np.ndarray, mask: np.ndarray) -> tuple[int, Made, bool]:
        """Write sample ``n`` to ``row`` [S + 1] and ``mask`` [S]; return source, made, filtered."""
        source, window = self._address(n)
        slot, raw = self.sources[source].read(window)
        made = self.objectives[source].fill(raw, slot, f"{self.key} sample {n}", row, mask)
        if self._vocab_size is not None and not 0 <= row.min() <= row.max() < self._vocab_size:
            raise UserError(
                f"{self.sources[source].prefix}: sample {n} holds ids {row.min()} to {row.max()}, "
                f"outside the vocabulary of {self._vocab_size}; the shard has been changed since "
                "it was made: check it with tools/inspect_data.py --verify"
            )
        if self._eods is not None:
            mask[row[:-1] == self._eods[source]] = 0.0
        filtered = self.repetition is not None and self.repetition.masks(raw)
        if filtered:
            mask[:] = 0.0
        return source, made, filtered

    def _address(self, n: int) -> tuple[int, int]:
        """Return (source, window) of sample ``n``."""
        if not 0 <= n < len(self):
            raise IndexError(f"sample {n} of a stream of {len(self)}")
        block, place = divmod(int(n), ADDRESS_BLOCK)
        if block != self._block:
            if block != self._touched_block:
                self._touched_block = block
                (source,), (window,) = self._locate(int(n), 1)
                return source, window
            self._block_addresses = self._locate(block * ADDRESS_BLOCK, ADDRESS_BLOCK)
            self._block = block
        sources, windows = self._block_addresses
        return sources[place], windows[place]

    def _locate(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Return sources and windows of ``count`` samples, fewer at the end of the stream."""
        numbers = np.arange(first, min(first + count, len(self)))
        sources, windows = self.addresses.locate(numbers)
        return sources.tolist(), windows.tolist()


def _bytes_per_token(source: Source) -> float | None:
    """Return the mean text bytes of a token, or None if a manifest lacks them."""
    manifests = [shard.manifest for shard in source.shards]
    size = sum(manifest.text_bytes for manifest in manifests if manifest is not None)
    return size / source.tokens if size and None not in manifests else None


def _eod(source: Source) -> int:
    """Return the end-of-document id of a source's tokenizer."""
    manifest = source.shards[0].manifest
    if manifest is None:
        raise UserError(
            f"{source.prefix}: --eod-mask-loss needs the end-of-document id, and the shard "
            "has no manifest; make the shard with tools/preprocess_corpus.py"
        )
    return manifest.tokenizer.eod


def _source_state(source: Source) -> dict[str, Any]:
    """Return what identifies a source's content."""
    hashes = [shard.manifest.bin.sha256 if shard.manifest else None for shard in source.shards]
    manifest = source.shards[0].manifest
    return {
        "name": source.name,
        "tokens": source.tokens,
        "sha256": hashes if len(hashes) > 1 else hashes[0],
        "tokenizer": manifest.tokenizer.fingerprint if manifest else None,
    }
