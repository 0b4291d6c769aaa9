"""Options and flags of ``tools/preprocess_corpus.py``."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from moetron.common.cores import usable_cores
from moetron.common.data_path import bare_prefixes
from moetron.common.files import is_utf8
from moetron.data.encoding.filters import Filters


@dataclass(frozen=True)
class Options:
    """Options of ``tools/preprocess_corpus.py``."""

    inputs: Sequence[str]
    """Files, folders and globs; ``-`` is standard input."""
    tokenizer: str
    output_prefix: str
    text_key: str = "text"
    append_eod: bool = False
    workers: int = 1
    holdout_fraction: float = 0.0
    holdout_prefix: str | None = None
    max_bad_fraction: float = 0.001
    shard_size_tokens: int | None = None
    """Split the output into shards of at least this many tokens, ``PREFIX_00000``, ..."""
    share: str | None = None
    """``I/N``: process only this partition of the inputs, for ``merge_shares`` to merge."""
    merge_shares: int | None = None
    """Merge this many partitions into the output instead of reading the inputs."""
    engine: str = "local"
    """``local`` or ``ray``."""
    filters: Filters = field(default_factory=Filters)
    fast: bool = True
    """Use the tokenizer's fast engine, if it has one, while it gives the reference's ids."""

    def problems(self) -> list[str]:
        """Return all problems of the options."""
        found = []
        if self.workers < 1:
            found.append(f"--workers {self.workers}: must be at least 1")
        if not 0 <= self.holdout_fraction < 1:
            found.append(f"--holdout-fraction {self.holdout_fraction}: must be in [0, 1)")
        if (self.holdout_fraction > 0) != (self.holdout_prefix is not None):
            found.append("--holdout-fraction and --holdout-prefix: give both or neither")
        for flag, prefix in (
            ("--output-prefix", self.output_prefix),
            ("--holdout-prefix", self.holdout_prefix),
        ):
            if prefix is not None and (problem := _prefix_problem(prefix)):
                found.append(f"{flag} {prefix!a}: {problem}")
        if self.holdout_prefix and (
            os.path.realpath(self.holdout_prefix) == os.path.realpath(self.output_prefix)
        ):
            found.append(
                f"--holdout-prefix {self.holdout_prefix}: must differ from --output-prefix"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            found.append(f"--max-bad-fraction {self.max_bad_fraction}: must be in [0, 1]")
        if self.shard_size_tokens is not None and self.shard_size_tokens < 1:
            found.append(f"--shard-size-tokens {self.shard_size_tokens}: must be at least 1")
        if self.merge_shares is not None and self.merge_shares < 1:
            found.append(f"--merge-shares {self.merge_shares}: must be at least 1")
        if self.shard_size_tokens is not None:
            for prefix in filter(None, (self.output_prefix, self.holdout_prefix)):
                if is_utf8(prefix) and Path(f"{prefix}.idx").exists():
                    found.append(
                        f"--shard-size-tokens {self.shard_size_tokens}: {prefix}.idx exists from a "
                        f"run without it, and --data-path {prefix} would still read it; "
                        "remove that shard or choose another prefix"
                    )
        if self.share is not None and self.merge_shares is not None:
            found.append("--share and --merge-shares: exclude each other; give one")
        if (self.share or self.merge_shares) and "-" in self.inputs:
            found.append("--input -: standard input cannot be partitioned; give files")
        return found + self.filters.problems()

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Options":
        """Return the options of parsed arguments."""
        given = vars(arguments).copy()
        filters = Filters(**{field.name: given.pop(field.name) for field in fields(Filters)})
        return cls(inputs=given.pop("input"), filters=filters, **given)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``Options``."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help="files, folders, globs, or -")
    add("--text-key", default="text", help="key or column of the text in a row (default: text)")
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="a SentencePiece .model, a HuggingFace tokenizer.json (or its folder), or 'bytes'",
    )
    add("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    add("--append-eod", action="store_true", help="end each document with the end-of-document id")
    add("--workers", type=int, default=usable_cores(), help="processes (default: all cores)")
    add(
        "--holdout-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="fraction of documents held out for validation, chosen by a hash of their text",
    )
    add("--holdout-prefix", metavar="Q", help="output prefix of the held-out documents")
    add(
        "--max-bad-fraction",
        type=float,
        default=0.001,
        metavar="F",
        help="fail if more than this fraction of the rows is bad (default: 0.001)",
    )
    add(
        "--shard-size-tokens",
        type=int,
        metavar="N",
        help="start a new shard after N tokens: P_00000, P_00001, ... (P names the shard set)",
    )
    add("--share", metavar="I/N", help="process partition I (from 0) of N, by files: SLURM arrays")
    add("--merge-shares", type=int, metavar="N", help="only merge N finished partitions")
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="encode here, or on the Ray cluster of RAY_ADDRESS (default: %(default)s)",
    )
    add(
        "--no-fast",
        dest="fast",
        action="store_false",
        help="encode BPE with HuggingFace's library even where gigatoken gives the same ids",
    )
    _add_filters(parser.add_argument_group("documents to drop, counted in the manifest"))


def _add_filters(group: argparse._ArgumentGroup) -> None:
    """Add the flags of ``Filters``."""
    add = group.add_argument
    add(
        "--deduplicate",
        action="store_true",
        help="drop documents with the token ids of an earlier document of the output",
    )
    add(
        "--max-repetitions",
        type=int,
        metavar="N",
        help="drop if an n-gram of up to 13 tokens occurs N times in a row (OLMoE: 32)",
    )
    add(
        "--frequent-words",
        action="store_true",
        help="drop if one word is over 30%% of all words, or two over 50%% (OLMoE, for code)",
    )
    add("--min-stars", type=int, default=0, metavar="N", help="minimum stars (OLMoE, code: 2)")
    add(
        "--stars-key",
        default=Filters.stars_key,
        metavar="KEY",
        help="key of the stars in a row or its metadata (default: %(default)s)",
    )
    add("--min-tokens", type=int, default=0, help="drop shorter documents")
    add("--max-tokens", type=int, help="drop longer documents")


def _prefix_problem(prefix: str) -> str | None:
    """Return the problem of an output prefix, if any."""
    if not is_utf8(prefix):
        return "the name is not UTF-8; choose another"
    if prefix.endswith(("/", os.sep)) or Path(prefix).name in ("", ".."):
        return "names a folder; add a file name prefix, such as 'train'"
    if bare_prefixes([prefix]) != [prefix]:
        return "names one file of a shard; give the name without .bin or .idx"
    return None
