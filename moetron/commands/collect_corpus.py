"""Collect local text to JSONL, one file a source, with .manifest.json beside.

system: text on this machine: the Python standard library, documentation, manual pages.
debian: a multilingual mix of prose, dictionaries, technical text, mathematics and code from Debian
packages, downloaded with apt-get and unpacked below DIR/.packages; nothing is installed.
A repeated run with the same options finds a complete corpus current and does nothing.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from moetron.common.cores import usable_cores
from moetron.common.errors import UserError
from moetron.common.files import require_writable
from moetron.data.corpora import debian, python_text, system_text
from moetron.data.corpora.collect import (
    MANIFEST,
    SourceCount,
    Task,
    is_current,
    write_corpus,
    write_manifest,
)
from moetron.moe.config.schema.paths import ToolParser

DEFAULT_MB = {"system": 32.0, "debian": 400.0, "all": 432.0}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the corpus")
    add("--source", choices=sorted(DEFAULT_MB), default="system", help="default: %(default)s")
    add("--max-mb", type=float, help="total budget of the sources (default: 32; debian: 400)")
    add("--workers", type=int, default=usable_cores(), help="processes (default: all cores)")
    return parser.parse_args(arguments)


def gather(source: str, output: Path) -> tuple[list[Task], Mapping[str, str]]:
    """Return the tasks of the chosen sources, and their licences."""
    tasks: list[Task] = []
    licences: dict[str, str] = {}
    if source in ("system", "all"):
        tasks += python_text.standard_library() + python_text.installed_packages()
        tasks += system_text.documentation() + system_text.manuals()
        licences |= python_text.licences() | system_text.licences()
    if source in ("debian", "all"):
        found, stated = debian.gather(output / ".packages", print)
        tasks += found
        licences |= stated
    return tasks, licences


def run(arguments: list[str] | None = None) -> int:
    """Find files, read them and write the corpus; return the exit code."""
    args = parse(arguments)
    budget_mb = args.max_mb or DEFAULT_MB[args.source]
    made_from = {"source": args.source, "max_mb": budget_mb, "python": sys.version}
    if is_current(args.output, made_from):
        print(f"{args.output} is current")
        return 0
    require_writable(args.output / MANIFEST)
    (args.output / MANIFEST).unlink(missing_ok=True)
    started = time.monotonic()
    tasks, licences = gather(args.source, args.output)
    print(f"{len(tasks):,} files found, {time.monotonic() - started:.0f} s", flush=True)

    def report(source: str, count: SourceCount) -> None:
        print(
            f"{source:<28} {count.documents:>7,} documents {count.bytes / 1e6:>7.1f} MB "
            f"{count.duplicates:>6,} duplicates  {time.monotonic() - started:>4.0f} s",
            flush=True,
        )

    counts = write_corpus(tasks, args.output, round(budget_mb * 1e6), args.workers, report)
    write_manifest(args.output, made_from, counts, licences)
    total = sum(count.bytes for count in counts.values())
    print(f"{args.output}: {total / 1e6:.1f} MB in {len(counts)} sources")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; raise UserError for a file that cannot be used."""
    try:
        return run(arguments)
    except OSError as error:
        raise UserError(str(error)) from error
