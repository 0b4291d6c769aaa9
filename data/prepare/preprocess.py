"""From text to token shards: find, read, encode in many processes, write, vouch."""

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
from moetron.data.prepare.output_lock import held
from moetron.data.prepare.partitions import (
    SIZES_VOCAB,
    Share,
    read_share,
    remove_share,
    sizes_prefix,
    with_sizes,
)
from moetron.data.prepare.ray_engine import require_ray
from moetron.data.prepare.shard_set_writer import FamilyWriter
from moetron.data.readers import standard_input
from moetron.data.readers.first_rows import ROWS, require_texts
from moetron.data.readers.input_files import find_files
from moetron.data.shards.manifest import Manifest, TokenizerRecord, read_manifest, write_manifest
from moetron.data.shards.shard_set import family
from moetron.tokenizers.interface import Tokenizer
from moetron.tokenizers.load import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The shards that are there now."""

    manifests: dict[str, Manifest]
    """By prefix."""
    current: bool
    """They were already there, made from the same inputs with the same settings."""
    summary: str


def preprocess(options: Options) -> Outcome:
    """Make the shard ``options`` describes, and the held-out one, unless they are current.

    Every file appears whole or not at all, the manifest last. Rows without usable text are listed
    in ``PREFIX.rejects.jsonl``. The bytes written do not depend on the number of workers, nor on
    how often the work was killed: the same call goes on from the journal, ``PREFIX.progress.json``.

    Raises:
        UserError: options or inputs are wrong, inputs change meanwhile, another run writes the
            same output, more rows are bad than allowed, or nothing is left.
        KeyboardInterrupt: a signal came; what was done is kept for the same call.
        UserError: the tokenizer cannot be loaded.
        OSError: a file cannot be written.
    """
    if problems := options.problems():
        raise UserError("\n".join(problems))
    if options.engine == "ray":
        require_ray()
    share = None if options.share is None else Share.parse(options.share)
    outputs = [prefix for prefix in (options.output_prefix, options.holdout_prefix) if prefix]
    mine = outputs if share is None else [share.prefix(output) for output in outputs]
    if named := [name for name in options.inputs if name != standard_input.NAME]:
        find_files(named, outputs)  # a mistake here leaves not even a folder behind
    tokenizer = load_tokenizer(options.tokenizer)
    kept = standard_input.kept(options.inputs, options.output_prefix, options.text_key)
    with held(mine), kept as inputs:
        files = find_files(inputs, outputs)
        run = _Run(options, files, tokenizer, share)
        if current := run.current():
            discard(run.prefixes)
            return Outcome(current, True, "the inputs and settings are those of the last run")
        return run.make() if options.merge_shares is None else run.merge(options.merge_shares)


class _Run:
    """One pass over the inputs."""

    def __init__(
        self, options: Options, files: list[Path], tokenizer: Tokenizer, share: Share | None
    ) -> None:
        self.options, self.tokenizer, self.share = options, tokenizer, share
        self.all_files, self.files = files, share.of(files) if share else files
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
        if share is not None:
            self.outputs = [share.prefix(output) for output in self.outputs]
            self.prefixes = self.outputs + list(map(sizes_prefix, self.outputs))
            self.vocab_sizes += [SIZES_VOCAB] * len(self.outputs)
        self.shard_size_tokens = None if share else options.shard_size_tokens
        self._warned = False
        self.deduplicate = options.filters.deduplicate and not share
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
        """The manifests of the outputs if all are there and were made as asked; else nothing."""
        found = {}
        for output in self.prefixes:
            prefixes = [output] if self.shard_size_tokens is None else family(output)
            for prefix in prefixes:
                manifest = read_manifest(prefix)
                if manifest is None or manifest.key != self.key or not _sizes_fit(prefix, manifest):
                    return {}
                found[prefix] = manifest
            if not prefixes or found[prefixes[0]].shards != len(prefixes):
                return {}
        return found

    def make(self) -> Outcome:
        """Read, encode, write; a user's mistake leaves nothing half-written behind."""
        state = read_state(self.prefixes[0], self.key)
        if state is None:
            self._look_first()
            state = self._begin(self.options.fast)
        try:
            try:
                return self._go_on(state)
            except EnginesDiffer as error:
                logger.warning("%s; beginning again with the reference", error)
                discard(self.prefixes)
                return self._go_on(self._begin(fast=False))
        except ReadFailed as error:
            raise ReadFailed(f"{error}; mend this and run the same command to go on") from None
        except UserError:
            discard(self.prefixes)
            raise

    def _look_first(self) -> None:
        """Refuse a key that the rows do not have, before all of them are read."""
        options = self.options
        for line in require_texts(self.all_files, options.text_key, options.max_bad_fraction):
            logger.warning("%s; its rows will count as bad", line)

    def merge(self, count: int) -> Outcome:
        """Put shares together, to the bytes of a single run, and remove them."""
        shares = [
            _Run(self.options, self.files, self.tokenizer, Share(number, count))
            for number in range(count)
        ]
        if missing := [run.outputs[0] for run in shares if not run.current()]:
            raise UserError(
                f"--merge-shares {count}: not there, or of other inputs or settings: "
                f"{', '.join(missing)}; make them with --share"
            )
        try:
            with self._open(self._begin(self.options.fast)) as (output, progress):
                for run in shares:
                    for encoded in read_share(run.outputs):
                        output.take(encoded)
                        progress.update(0, sum(side.tokens.size for side in encoded.sides))
                    progress.update(run.input_bytes, 0)
                outcome = Outcome(self._finish(output), False, progress.summary())
        finally:
            discard(self.prefixes)
        for run in shares:
            remove_share(run.outputs)
        return outcome

    def _begin(self, fast: bool) -> State:
        """The state of a run that has done nothing, with nothing of another's left."""
        if journal_path(self.prefixes[0]).exists():
            logger.warning(
                "%s: an unfinished run had other inputs, settings or tokenizer, or its files are "
                "not all there; beginning anew",
                self.prefixes[0],
            )
        discard(self.prefixes)
        return State(key=self.key, fast=fast, sides=[Side() for _ in self.prefixes])

    def _go_on(self, state: State) -> Outcome:
        """Do what is left."""
        with self._open(state) as (output, progress):
            self._encode(output, progress)
            outcome = Outcome(self._finish(output), False, progress.summary())
        discard(self.prefixes)
        return outcome

    @contextmanager
    def _open(self, state: State) -> Iterator[tuple[Output, ReadProgress]]:
        """The files to write, at ``state``, and what tells of the progress."""
        writers = [
            FamilyWriter(prefix, vocab_size, side, self.shard_size_tokens, self.deduplicate)
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
        """Bring every chunk's documents to their shards, in the inputs' order."""
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
        """Bring one chunk's documents to their shards."""
        if isinstance(encoded, LongDocument):
            output.take_long(encoded, len(self.outputs))
            progress.update(encoded.chunk.read_bytes, encoded.encoded_tokens)
            return
        output.take(with_sizes(encoded, len(self.outputs)) if self.share else encoded)
        progress.update(encoded.read_bytes, sum(side.tokens.size for side in encoded.sides))

    def _warn_of_bad(self, state: State) -> None:
        """Say once, while there is time to stop, that so far more rows are bad than allowed."""
        allowed = self.options.max_bad_fraction
        if self._warned or state.rows < ROWS or state.rejected <= allowed * state.rows:
            return
        self._warned = True
        logger.warning(
            "%d of the first %d rows are bad (%s); if that stays above --max-bad-fraction %s, the "
            "run is refused in the end",
            state.rejected,
            state.rows,
            state.reasons[0].reason,
            allowed,
        )

    def _finish(self, output: Output) -> dict[str, Manifest]:
        """Give all files their names and vouch for them."""
        state = output.state
        if changed := sorted({name for name, *_ in set(self.listing) ^ set(_listing(self.files))}):
            raise UserError(f"{', '.join(changed)}: changed while it was read; run again")
        output.finish_rejects()
        if self.share is None:
            self._check(output)
        manifests = {}
        for writer in output.writers:
            for prefix, part, bin_record, idx_record in writer.finish():
                manifests[prefix] = Manifest(
                    tokenizer=self.record,
                    dtype=writer.dtype.name,
                    **part.model_dump(),
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
        """Refuse too many bad rows, and an output without documents."""
        state = output.state
        if state.rejected > self.options.max_bad_fraction * state.rows:
            raise UserError(self._too_many_bad(state, output.rejects_path))
        for prefix, side in zip(self.prefixes, state.sides, strict=True):
            if side.documents == 0:
                raise UserError(self._nothing_left(state, prefix))

    def _sources(self) -> list[dict[str, Any]]:
        """The inputs as asked for, and their size."""
        inputs = list(self.options.inputs)
        return [{"inputs": inputs, "files": len(self.files), "bytes": self.input_bytes}]

    def _nothing_left(self, state: State, prefix: str) -> str:
        """Why a shard would be empty."""
        left_out = "".join(f", {name} {count}" for name, count in state.left_out.items())
        message = (
            f"{prefix}: no document for it; {len(self.files)} files hold {state.rows} rows, "
            f"of which left out: bad {state.rejected}{left_out}"
        )
        held_out = prefix == self.options.holdout_prefix
        return message + ("; raise --holdout-fraction" if held_out else "")

    def _too_many_bad(self, state: State, rejects_path: Path) -> str:
        """What is wrong with the rows."""
        examples = "".join(
            f"\n  {reject.file}{f':{reject.line}' if reject.line else ''}: {reject.reason}"
            for reject in state.reasons
        )
        return (
            f"{state.rejected} of {state.rows} rows are bad, more than --max-bad-fraction "
            f"{self.options.max_bad_fraction} allows; all are listed in {rejects_path}:{examples}"
        )


def _listing(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """(name, bytes, modification time) of each file: what identifies an input."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _sizes_fit(prefix: str, manifest: Manifest) -> bool:
    """Whether both files are there with the sizes that the manifest names."""
    for suffix, record in ((".bin", manifest.bin), (".idx", manifest.idx)):
        path = beside(prefix, suffix)
        if not path.is_file() or path.stat().st_size != record.bytes:
            return False
    return True
