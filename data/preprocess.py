"""From text to token shards: find, read, encode in many processes, write, vouch."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from moetron.data.encode import Documents, Encoding, encode_chunk
from moetron.data.errors import DataError
from moetron.data.files import atomic_file, beside
from moetron.data.inputs import Reject, find_files, read_chunks
from moetron.data.manifest import Manifest, TokenizerRecord, read_manifest, write_manifest
from moetron.data.parallel import ordered_map
from moetron.data.progress import Progress
from moetron.data.writer import ShardWriter
from moetron.tokenizers.load import load_tokenizer

REJECT_REASONS_SHOWN = 3


@dataclass(frozen=True)
class Options:
    """What ``tools/preprocess_corpus.py`` is asked to do."""

    inputs: Sequence[str]
    """Files, folders and globs."""
    tokenizer: str
    output_prefix: str
    text_key: str = "text"
    append_eod: bool = False
    workers: int = 1
    holdout_fraction: float = 0.0
    holdout_prefix: str | None = None
    max_bad_fraction: float = 0.001

    def problems(self) -> list[str]:
        """What is wrong with the options themselves."""
        found = []
        if self.workers < 1:
            found.append(f"--workers {self.workers}: must be at least 1")
        if not 0 <= self.holdout_fraction < 1:
            found.append(f"--holdout-fraction {self.holdout_fraction}: must be in [0, 1)")
        if (self.holdout_fraction > 0) != (self.holdout_prefix is not None):
            found.append("--holdout-fraction and --holdout-prefix need each other")
        if self.holdout_prefix == self.output_prefix:
            found.append(
                f"--holdout-prefix {self.holdout_prefix}: must differ from --output-prefix"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            found.append(f"--max-bad-fraction {self.max_bad_fraction}: must be in [0, 1]")
        return found


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
    in ``PREFIX.rejects.jsonl``. The bytes written do not depend on the number of workers.

    Raises:
        DataError: options or inputs are wrong, more rows are bad than allowed, or nothing is left.
        TokenizerError: the tokenizer cannot be loaded.
        OSError: a file cannot be written.
    """
    if problems := options.problems():
        raise DataError("\n".join(problems))
    files = find_files(options.inputs)
    tokenizer = load_tokenizer(options.tokenizer)
    record = TokenizerRecord(
        name=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
    )
    run = _Run(options, files, record)
    if current := run.current():
        return Outcome(current, True, "the inputs and settings are those of the last run")
    return run.make()


class _Run:
    """One pass over the inputs."""

    def __init__(self, options: Options, files: list[Path], tokenizer: TokenizerRecord) -> None:
        self.options, self.files, self.tokenizer = options, files, tokenizer
        self.prefixes = [options.output_prefix]
        if options.holdout_prefix is not None:
            self.prefixes.append(options.holdout_prefix)
        self.settings = {
            name: getattr(options, name)
            for name in ("text_key", "append_eod", "holdout_fraction", "max_bad_fraction")
        }
        stats = [(str(file.resolve()), file.stat()) for file in files]
        self.input_bytes = sum(stat.st_size for _, stat in stats)
        listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        identity = [listing, self.settings, self.prefixes, tokenizer.model_dump()]
        self.key = hashlib.sha256(orjson.dumps(identity)).hexdigest()
        self.rows = self.rejected = self.empty = 0
        self.reasons: list[Reject] = []

    def current(self) -> dict[str, Manifest]:
        """The manifests of the outputs if all are there and were made as asked; else nothing."""
        found = {}
        for prefix in self.prefixes:
            manifest = read_manifest(prefix)
            if manifest is None or manifest.key != self.key or not _sizes_fit(prefix, manifest):
                return {}
            found[prefix] = manifest
        return found

    def make(self) -> Outcome:
        """Read, encode, write."""
        text_bytes = dict.fromkeys(self.prefixes, 0)
        with ExitStack() as stack:
            writers = [
                stack.enter_context(ShardWriter(prefix, self.tokenizer.vocab_size))
                for prefix in self.prefixes
            ]
            progress = stack.enter_context(Progress("preprocess", self.input_bytes))
            self._encode(writers, text_bytes, progress)
            for writer in writers:
                if writer.documents == 0:
                    raise DataError(self._nothing_left(str(writer.prefix)))
            manifests = {
                prefix: self._finish(writer, text_bytes[prefix])
                for prefix, writer in zip(self.prefixes, writers, strict=True)
            }
            return Outcome(manifests, False, progress.summary())

    def _encode(
        self, writers: list[ShardWriter], text_bytes: dict[str, int], progress: Progress
    ) -> None:
        """Bring every chunk's documents to their writers, in the inputs' order."""
        options = self.options
        encoding = Encoding(
            options.tokenizer, options.text_key, options.append_eod, options.holdout_fraction
        )
        rejects_path = beside(options.output_prefix, ".rejects.jsonl")
        rejects_path.unlink(missing_ok=True)
        chunks = read_chunks(self.files)
        with atomic_file(rejects_path) as rejects_file:
            for encoded in ordered_map(partial(encode_chunk, encoding), chunks, options.workers):
                sides = (encoded.training, encoded.held_out)
                for prefix, writer, side in zip(self.prefixes, writers, sides, strict=False):
                    writer.add(side.tokens, side.lengths)
                    text_bytes[prefix] += side.text_bytes
                self._count(encoded.rejects, encoded.empty, sides, rejects_file)
                progress.update(encoded.read_bytes, sum(side.tokens.size for side in sides))
        if self.rejected == 0:
            rejects_path.unlink()
        elif self.rejected > options.max_bad_fraction * self.rows:
            raise DataError(self._too_many_bad(rejects_path))

    def _count(
        self,
        rejects: list[Reject],
        empty: int,
        sides: tuple[Documents, Documents],
        rejects_file: BinaryIO,
    ) -> None:
        """Take note of a chunk's rows, good and bad."""
        self.rows += len(rejects) + empty + sum(side.lengths.size for side in sides)
        self.rejected += len(rejects)
        self.empty += empty
        self.reasons += rejects[: REJECT_REASONS_SHOWN - len(self.reasons)]
        for reject in rejects:
            rejects_file.write(orjson.dumps(asdict(reject)) + b"\n")

    def _finish(self, writer: ShardWriter, text_bytes: int) -> Manifest:
        """Give a shard its name and vouch for it."""
        bin_record, idx_record = writer.finish()
        manifest = Manifest(
            tokenizer=self.tokenizer,
            dtype=writer.dtype.name,
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=text_bytes,
            appended_eod=self.options.append_eod,
            bin=bin_record,
            idx=idx_record,
            sources=self._sources(),
            filters={"rejected": self.rejected, "empty": self.empty},
            settings=self.settings,
            key=self.key,
        )
        write_manifest(writer.prefix, manifest)
        return manifest

    def _sources(self) -> list[dict[str, Any]]:
        """The inputs as asked for, and their size."""
        inputs = list(self.options.inputs)
        return [{"inputs": inputs, "files": len(self.files), "bytes": self.input_bytes}]

    def _nothing_left(self, prefix: str) -> str:
        """Why a shard would be empty."""
        message = (
            f"{prefix}: no document for it; {len(self.files)} files hold {self.rows} rows, "
            f"of which {self.rejected} are bad and {self.empty} empty"
        )
        held_out = prefix == self.options.holdout_prefix
        return message + ("; raise --holdout-fraction" if held_out else "")

    def _too_many_bad(self, rejects_path: Path) -> str:
        """What is wrong with the rows."""
        examples = "".join(
            f"\n  {reject.file}{f':{reject.line}' if reject.line else ''}: {reject.reason}"
            for reject in self.reasons
        )
        return (
            f"{self.rejected} of {self.rows} rows are bad, more than --max-bad-fraction "
            f"{self.options.max_bad_fraction} allows; all are listed in {rejects_path}:{examples}"
        )


def _sizes_fit(prefix: str, manifest: Manifest) -> bool:
    """Whether both files are there with the sizes that the manifest names."""
    for suffix, record in ((".bin", manifest.bin), (".idx", manifest.idx)):
        path = beside(prefix, suffix)
        if not path.is_file() or path.stat().st_size != record.bytes:
            return False
    return True
