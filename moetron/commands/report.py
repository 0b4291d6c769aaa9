"""Write the report page of one or several runs, or the curves of one run as a picture.

    python tools/report.py RUN [RUN ...] [--output FILE.html]
    python tools/report.py RUN --output curves.png

RUN is a --save folder. The page (default: RUN/report.html) includes the results of
tools/analyze_routing.py, if it ran. Exit codes: 0 done, 2 user error, reported in one message.
"""

import sys
from pathlib import Path

from moetron.common.errors import UserError
from moetron.moe.analysis.curves import draw
from moetron.moe.config.schema.paths import ToolParser

PICTURES = (".png", ".svg", ".pdf")


_FILES = "metrics.jsonl, validation.jsonl, starts.jsonl or analysis/analysis.json"
_WRONG_VALUES = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError),
    *(StopIteration, RecursionError, MemoryError),
)
"""What values of other types and sizes lead to: the files have no schema of their own."""


def write(runs: list[Path], output: Path) -> None:
    """Write a page or a picture, chosen by the suffix of ``output``.

    Raises:
        UserError: a file of a run cannot be read, or holds other values than Moetron writes.
    """
    try:
        _write(runs, output)
    except UserError:
        raise
    except _WRONG_VALUES as error:
        folders = ", ".join(map(str, runs))
        raise UserError(
            f"{folders}: {_FILES} is damaged or of another version: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error


def _write(runs: list[Path], output: Path) -> None:
    if output.suffix in PICTURES:
        if len(runs) > 1:
            raise UserError(f"--output {output}: a picture shows one run; write .html for several")
        draw(runs[0], output)
    elif output.suffix == ".html":
        from moetron.moe.analysis.page.build_page import write_page  # imports plotly: one second
        from moetron.moe.analysis.page.runs import read

        write_page([read(run) for run in runs], output)
    else:
        raise UserError(f"--output {output}: name a file .html, {', '.join(PICTURES)}")


def main() -> int:
    """Write the page or picture and print its path; return the exit code."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, help="(default: report.html in the first run)")
    options = parser.parse_args()
    output = options.output or options.runs[0] / "report.html"
    try:
        write(options.runs, output)
    except (UserError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"report: {output}")
    return 0
