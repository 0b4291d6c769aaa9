"""Write the report page of a run, or of several to compare; or just a run's curves as a picture.

    python tools/report.py RUN [RUN ...] [--output FILE.html]
    python tools/report.py RUN --output curves.png

RUN is a --save folder. The page (default: RUN/report.html) shows what tools/analyze_routing.py
found, if it ran. Exit codes: 0 done, 2 something to mend, named in one message.
"""

import sys
from pathlib import Path

from moetron.common.errors import UserError
from moetron.moe.analysis.curves import draw
from moetron.moe.config.schema.paths import ToolParser

PICTURES = (".png", ".svg", ".pdf")


def write(runs: list[Path], output: Path) -> None:
    """Write a page or a picture, as the name says."""
    if output.suffix in PICTURES:
        if len(runs) > 1:
            raise UserError(f"--output {output}: a picture shows one run; write .html for several")
        draw(runs[0], output)
    elif output.suffix == ".html":
        from moetron.moe.analysis.page.build_page import write_page  # a second of imports
        from moetron.moe.analysis.page.runs import read

        write_page([read(run) for run in runs], output)
    else:
        raise UserError(f"--output {output}: name a file .html, {', '.join(PICTURES)}")


def main() -> int:
    """Write, and say where."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs' folders")
    parser.add_argument("--output", type=Path, help="default: report.html in the first run")
    options = parser.parse_args()
    output = options.output or options.runs[0] / "report.html"
    try:
        write(options.runs, output)
    except (UserError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"report: {output}")
    return 0
