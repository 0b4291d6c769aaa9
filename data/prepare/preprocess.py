"""Preprocess text to token shards: find, read, encode, write, record."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from moetron.common.errors import ReadFailed, UserError
from moetron.common.files import beside
from moetron.common.progress import ReadProgress
from moetron.common.stop_signal import INTERRUPTS, StopSignal
from moetron.data.encoding.encode import Encoded, Encoding, EnginesDiffer
from moetron.data.encoding.long_documents import LongDocument
from moetron.data.prepare.engine import encoded_chunks
from moetron.data.prepare.journal import Side, State, journal_path, read_state
from moetron.data.prepare.options import Options
from moetron.data.prepare.output import Output, discard
from moetron.data.prepare.output_lock import lock_outputs
from moetron.data.prepare.partitions import (
    SIZES_VOCAB,
    Partition,
    read_partition,
    remove_partition,
    sizes_prefix,
    with_sizes,
)
from moetron.data.prepare.ray_engine import require_ray
from moetron.data.prepare.shard_set_writer import ShardSetWriter
from moetron.data.readers import standard_input
from moetron.data.readers.first_rows import ROWS, require_texts
from moetron.data.readers.input_files import find_files
from moetron.data.shards.manifest import Manifest, TokenizerRecord, read_manifest, write_manifest
from moetron.data.shards.shard_set import shard_prefixes
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Result of preprocessing: the shards that exist now."""

    manifests: dict[str, Manifest]
    """Manifests by prefix."""
    current: bool
    """True if they existed already, made from the same inputs with the same settings."""
    summary: str


def preprocess(options: Options) -> Outcome:
    """Write the shard that ``options`` describes, and the held-out one, unless they are current.

    Files are written atomically, the manifest last. Rows without usable text are listed in
    ``PREFIX.rejects.jsonl``. The bytes written do not depend on the number of workers, nor on
    interruptions: the same call resumes from the journal, ``PREFIX.progress.json``.

    Raises:
        UserError: options or inputs are wrong, the tokenizer cannot be loaded, inputs change
        meanwhile, another run writes the same output, more rows are bad than allowed, or no
        document is left.
        KeyboardInterrupt: a signal came; finished work is kept for the same call.
        OSError: a file cannot be written.
    """
    if problems := options.problems():
        raise UserError("\n".join(problems))
    if options.engine == "ray":
        require_ray()
    partition = None if options.share is None else Partition.parse(options.share)
    outputs = [prefix for prefix in (options.output_prefix, options.holdout_prefix) if prefix]
    mine = outputs if partition is None else [partition.prefix(output) for output in outputs]
    if named := [name for name in options.inputs if name != standard_input.NAME]:
        find_files(named, outputs)  # before any folder is created
    tokenizer = load_tokenizer(options.tokenizer)
    copied = standard_input.with_copy(options.inputs, options.output_prefix, options.text_key)
    with lock_outputs(mine), copied as inputs:
        files = find_files(inputs, outputs)
        run = _Run(options, files, tokenizer, partition)
        if current := run.current():
            discard(run.prefixes)
            return Outcome(current, True, "the inputs and settings are those of the last run")
        return run.make() if options.merge_shares is None else run.merge(options.merge_shares)


class _Run:
    """One pass over the inputs."""

    def __init__(
        self, options: Options, files: list[Path], tokenizer: Tokenizer, partition: Partition | None
    ) -> None:
        self.options, self.tokenizer, self.partition = options, tokenizer, partition
        self.all_files, self.files = files, partition.select(files) if partition else files
        self.record = TokenizerRecord(
            name=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
        )
        self.outputs = [options.output_prefix]
        if options.holdout_prefix is not None:
            self.outputs.append(options.holdout_prefix)
        self.prefixes, self.vocab_sizes = self.outputs, [tokenizer.vocab_size] * len(self.outputs)
        if partition is not None:
            self.outputs = [partition.prefix(output) for output in self.outputs]
            self.prefixes = self.outputs + list(map(sizes_prefix, self.outputs))
            self.vocab_sizes += [SIZES_VOCAB] * len(self.outputs)
        self.shard_size_tokens = None if partition else options.shard_size_tokens
        self._warned = False
        self.deduplicate = options.filters.deduplicate and not partition
        self.settings: dict[str, Any] = {
            name: getattr(options, name)
            for name in (
                "text_key",
                "append_eod",
                "holdout_fraction",
                "max_bad_fraction",
                "shard_size_tokens",
            )
        }
        self.settings["filters"] = asdict(options.filters)
        self.listing = _listing(self.files)
        self.input_bytes = sum(size for _, size, _ in self.listing)
        identity = [self.listing, self.settings, self.prefixes, self.record.model_dump()]
        self.key = hashlib.sha256(orjson.dumps(identity)).hexdigest()

    def current(self) -> dict[str, Manifest]:
        """Return the manifests of the outputs if all have this run's key, else nothing."""
        found = {}
        for output in self.prefixes:
            prefixes = [output] if self.shard_size_tokens is None else shard_prefixes(output)
            for prefix in prefixes:
                manifest = read_manifest(prefix)
                if manifest is None or manifest.key != self.key or not _sizes_fit(prefix, manifest):
                    return {}
                found[prefix] = manifest
            if not prefixes or found[prefixes[0]].shards != len(prefixes):
                return {}
        return found

    def make(self) -> Outcome:
        """Read, encode and write; a user's mistake leaves no partial output."""
        state = read_state(self.prefixes[0], self.key)
        if state is None:
            self._check_first_rows()
            state = self._begin(self.options.fast)
        try:
            try:
                return self._resume(state)
            except EnginesDiffer as error:
                logger.warning("%s; restarting with the reference", error)
                discard(self.prefixes)
                return self._resume(self._begin(fast=False))
        except ReadFailed as error:
            raise ReadFailed(f"{error}; fix this and run the same command to resume") from None
        except UserError:
            discard(self.prefixes)
            raise

    def _check_first_rows(self) -> None:
        """Raise UserError if the first rows lack the text key, before all rows are read."""
        options = self.options
        for line in require_texts(self.all_files, options.text_key, options.max_bad_fraction):
            logger.warning("%s; its rows will count as bad", line)

    def merge(self, count: int) -> Outcome:
        """Merge partitions to the bytes of a single run, and remove them."""
        partitions = [
            _Run(self.options, self.files, self.tokenizer, Partition(number, count))
            for number in range(count)
        ]
        if missing := [run.outputs[0] for run in partitions if not run.current()]:
            raise UserError(
                f"--merge-shares {count}: missing, or made with other inputs or settings: "
                f"{', '.join(missing)}; make them with --share"
            )
        try:
            with self._open(self._begin(self.options.fast)) as (output, progress):
                for run in partitions:
                    for encoded in read_partition(run.outputs):
                        output.take(encoded)
                        progress.update(0, sum(side.tokens.size for side in encoded.sides))
                    progress.update(run.input_bytes, 0)
                outcome = Outcome(self._finish(output), False, progress.summary())
        finally:
            discard(self.prefixes)
        for run in partitions:
            remove_partition(run.outputs)
        return outcome

    def _begin(self, fast: bool) -> State:
        """Return the state of a new run, after removing the files of any earlier one."""
        if journal_path(self.prefixes[0]).exists():
            logger.warning(
                "%s: an unfinished run had other inputs, settings or tokenizer, or some of its "
                "files are missing; restarting",
                self.prefixes[0],
            )
        discard(self.prefixes)
        return State(key=self.key, fast=fast, sides=[Side() for _ in self.prefixes])

    def _resume(self, state: State) -> Outcome:
        """Do the rest of the work from ``state``."""
        with self._open(state) as (output, progress):
            self._encode(output, progress)
            outcome = Outcome(self._finish(output), False, progress.summary())
        discard(self.prefixes)
        return outcome

    @contextmanager
    def _open(self, state: State) -> Iterator[tuple[Output, ReadProgress]]:
        """Open the output files at ``state``, and the progress bar."""
        writers = [
            ShardSetWriter(prefix, vocab_size, side, self.shard_size_tokens, self.deduplicate)
            for prefix, vocab_size, side in zip(
                self.prefixes, self.vocab_sizes, state.sides, strict=True
            )
        ]
        with (
            Output(writers, state) as output,
            ReadProgress("preprocess", self.input_bytes, state.read_bytes) as progress,
        ):
            yield output, progress

    def _encode(self, output: Output, progress: ReadProgress) -> None:
        """Write every chunk's documents to their shards, in the inputs' order."""
        options = self.options
        encoding = Encoding(
            options.tokenizer,
            options.text_key,
            options.append_eod,
            options.holdout_fraction,
            options.filters,
            output.state.fast and options.fast,
        )
        chunks = encoded_chunks(
            self.files,
            output.state.cursor,
            encoding,
            self.tokenizer,
            options.workers,
            options.engine,
        )
        with StopSignal("chunk", INTERRUPTS, interrupt=True) as stopping:
            try:
                for encoded in chunks:
                    self._take(encoded, output, progress)
                    self._warn_of_bad(output.state)
                    if stopping():
                        break
            except BrokenExecutor:
                if not stopping():  # the signal went to the workers too
                    raise
            if stopping():
                output.mark()
                raise KeyboardInterrupt

    def _take(
        self, encoded: Encoded | LongDocument, output: Output, progress: ReadProgress
    ) -> None:
        """Write one chunk's documents to their shards."""
        if isinstance(encoded, LongDocument):
            output.take_long(encoded, len(self.outputs))
            progress.update(encoded.chunk.read_bytes, encoded.encoded_tokens)
            return
        output.take(with_sizes(encoded, len(self.outputs)) if self.partition else encoded)
        progress.update(encoded.read_bytes, sum(side.tokens.size for side in encoded.sides))

    def _warn_of_bad(self, state: State) -> None:
        """Warn once, early, if more rows are bad so far than allowed."""
        allowed = self.options.max_bad_fraction
        if self._warned or state.rows < ROWS or state.rejected <= allowed * state.rows:
            return
        self._warned = True
        logger.warning(
            "%d of the first %d rows are bad (%s); if that stays above --max-bad-fraction %s, the "
            "run fails at the end",
            state.rejected,
            state.rows,
            state.reasons[0].reason,
            allowed,
        )

    def _finish(self, output: Output) -> dict[str, Manifest]:
        """Rename all files to their final names and write the manifests."""
        state = output.state
        if changed := sorted({name for name, *_ in set(self.listing) ^ set(_listing(self.files))}):
            raise UserError(f"{', '.join(changed)}: changed while it was read; run again")
        output.finish_rejects()
        if self.partition is None:
            self._check(output)
        manifests = {}
        for writer in output.writers:
            for prefix, part, max_id, bin_record, idx_record in writer.finish():
                manifests[prefix] = Manifest(
                    tokenizer=self.record,
                    dtype=writer.dtype.name,
                    **part.model_dump(),
                    max_id=max_id,
                    appended_eod=self.options.append_eod,
                    bin=bin_record,
                    idx=idx_record,
                    shards=len(writer.side.parts),
                    sources=self._sources(),
                    filters={"rejected": state.rejected, **dict(sorted(state.left_out.items()))},
                    settings=self.settings,
                    key=self.key,
                )
                write_manifest(prefix, manifests[prefix])
        return manifests

    def _check(self, output: Output) -> None:
        """Raise UserError for too many bad rows, or an output without documents."""
        state = output.state
        if state.rejected > self.options.max_bad_fraction * state.rows:
            raise UserError(self._too_many_bad(state, output.rejects_path))
        for prefix, side in zip(self.prefixes, state.sides, strict=True):
            if side.documents == 0:
                raise UserError(self._nothing_left(state, prefix))

    def _sources(self) -> list[dict[str, Any]]:
        """Return the inputs as given, and their size."""
        inputs = list(self.options.inputs)
        return [{"inputs": inputs, "files": len(self.files), "bytes": self.input_bytes}]

    def _nothing_left(self, state: State, prefix: str) -> str:
        """Return the message for an output without documents."""
        left_out = "".join(f", {name} {count}" for name, count in state.left_out.items())
        message = (
            f"{prefix}: no documents left; {len(self.files)} files hold {state.rows} rows, "
            f"of which dropped: bad {state.rejected}{left_out}"
        )
        held_out = prefix == self.options.holdout_prefix
        return message + ("; raise --holdout-fraction" if held_out else "")

    def _too_many_bad(self, state: State, rejects_path: Path) -> str:
        """Return the message for too many bad rows."""
        examples = "".join(
            f"\n  {reject.file}{f':{reject.line}' if reject.line else ''}: {reject.reason}"
            for reject in state.reasons
        )
        return (
            f"{state.rejected} of {state.rows} rows are bad, more than --max-bad-fraction "
            f"{self.options.max_bad_fraction} allows; all are listed in {rejects_path}:{examples}"
        )


def _listing(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return (name, bytes, modification time) of each file, which identify an input."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _sizes_fit(prefix: str, manifest: Manifest) -> bool:
    """Return whether both files exist with the sizes in the manifest."""
    for suffix, record in ((".bin", manifest.bin), (".idx", manifest.idx)):
        path = beside(prefix, suffix)
        if not path.is_file() or path.stat().st_size != record.bytes:
            return False
    return True
